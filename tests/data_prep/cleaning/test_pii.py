import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import pii
from data_prep.cleaning.pii import MASKS, Masker

IDENTITY = "11010519491231002X"  # the example of GB 11643
CARD = "4111 1111 1111 1111"

MASKED = {
    "email": [
        "a.b+c@mail.example.org",
        "zhang_san@qq.com",
        "x@sub-domain.co.uk",
    ],
    "ip": [
        "8.8.8.8",
        "1.1.1.1",
        "12.34.56.78",
        "114.114.114.114",
        "2001:4860:4860::8888",
        "2400:3200::1",
        "2606:4700:0:0:0:0:0:1111",
    ],
    "card": [CARD, "4111111111111111", "5500-0000-0000-0004", "340000000000009"],
    "id": [IDENTITY, IDENTITY.lower()],
    "phone": [
        "13812345678",
        "138-1234-5678",
        "+86 13812345678",
        "021-62345678",
        "(415) 555-2671",
        "415-555-2671",
        "+1 415 555 2671",
        "+44 20 7946 0958",
        "+49 (30) 123 4567",
    ],
}
KEPT = {
    "email": [
        "@property",
        "user @ home",
        "git@github.com:a/b",
        "ssh://git@example.org/a",
        "logo@2x.png",
        "react@18.2.0",
        "a@b",
        "@张三",
        "x@.com",
    ],
    "ip": [
        *("10.0.0.1", "127.0.0.1", "192.168.1.1", "172.16.5.4", "192.0.2.7", "198.51.100.1", "203.0.113.9", "0.0.0.0"),
        *("255.255.255.0", "v1.2.3.4", "version 1.2.3.4", "Version: 2.4.6.1", "版本 1.2.3.4", "版本号：1.2.3.4"),
        *("section 3.2.1.4", "Section 3.2.1.45", "第3.2.1.4节", "第 3.2.1.45 节", "§ 3.2.1.4", "§3.2.1.64"),
        *("Firefox 3.6.1.2", ".NET 4.7.2.0", "JDK 1.8.0.29", "1.5.2.3 版", "1.5.2.36版", "版本为1.2.3.4"),
        *("版本号为 1.2.3.44", "version is 1.2.3.44", "1.2.3.4.5"),
        *("256.1.1.1", "1.2.3", "1.02.3.4", "::1", "fe80::1", "2001:db8::1", "std::vector", "12:30:45"),
    ],
    "card": ["4111 1111 1111 1112", "1234567890123456", "0.4111111111111111"],
    "id": ["110105194912310021", "110105194913310020", "x11010519491231002X1"],
    "phone": [
        "1700000000",
        "1700000000000",
        "12345678901",
        "3.13812345678",
        "2024-01-02",
        "192.168.1.1",
        "123-45-6789",
    ],
}


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in MASKED.items() for value in values])
def test_personal_data_is_masked_in_english_and_chinese(kind: str, value: str) -> None:
    masker = Masker([kind], "[{kind}]")
    assert masker(f"Write to {value}, please.") == f"Write to [{kind.upper()}], please."
    assert masker(f"请联系{value}。谢谢") == f"请联系[{kind.upper()}]。谢谢"
    assert masker(value) == f"[{kind.upper()}]"
    assert masker.masked == {kind: 3}


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in KEPT.items() for value in values])
def test_what_only_looks_like_it_stays(kind: str, value: str) -> None:
    masker = Masker([kind], "[{kind}]")
    assert masker(f"See {value}, please.") == f"See {value}, please."
    assert not masker.masked


@pytest.mark.parametrize(
    "text",
    [
        "DNS: {}",
        "IP 为 {}",
        "the server {}",
        "address is {}",
        "服务器地址：{}",
        "open {}:8080",
        "route {}/24",
        "ping {}",
        "http://{}/",
        "root@{}",
    ],
)
def test_four_small_numbers_are_an_address_where_the_words_around_say_so(text: str) -> None:
    assert Masker(["ip"], "[{kind}]")(text.format("4.2.2.1")) == text.format("[IP]")


def test_only_the_chosen_kinds_are_masked_and_counted() -> None:
    masker = Masker(["email"], "<{kind}>")
    text = "a@b.cn and c@d.cn at 8.8.8.8"
    assert masker(text) == "<EMAIL> and <EMAIL> at 8.8.8.8"
    assert masker.masked == {"email": 2}


def test_an_identity_number_is_not_taken_for_a_phone_number() -> None:
    assert Masker(MASKS, "[{kind}]")(f"号码{IDENTITY}，电话13812345678") == "号码[ID]，电话[PHONE]"


@pytest.mark.parametrize("placeholder", ["", "a@b.cn", "1", "{name}", "<x>", "{kind}:"])
def test_a_placeholder_that_could_be_masked_is_refused(placeholder: str) -> None:
    with pytest.raises(ValueError, match="must be not empty"):
        pii.check_placeholder(placeholder)


@given(st.text("a1.@:+-()[] \n8v中", max_size=80))
def test_masking_twice_is_masking_until_nothing_is_left(text: str) -> None:
    masker = Masker(MASKS, "[{kind}]")
    while (masked := masker(text)) != text:
        assert len(masker.masked) > 0
        text = masked
    before = dict(masker.masked)
    assert masker(text) == text
    assert dict(masker.masked) == before


@given(st.integers(0, 10**17))
def test_every_wrong_digit_breaks_a_check_digit(number: int) -> None:
    digits = f"{number:017}"
    checks = [str(check) for check in range(10) if pii.is_card(digits + str(check))]
    assert len(checks) == 1
    wrong = str((int(digits[5]) + 1) % 10)
    assert not pii.is_card(digits[:5] + wrong + digits[6:] + checks[0])
    assert sum(pii.is_identity(digits + check) for check in "0123456789X") == 1


def test_long_texts_without_personal_data_take_linear_time() -> None:
    masker = Masker(MASKS, "[{kind}]")
    for piece in ("a.", "1.", "@", "a@", "2001:", "+1 ", "4 ", "1-"):
        assert masker(piece * 50_000) == piece * 50_000
