"""Personal data in text: e-mail addresses, IP addresses, phone, payment card and Chinese identity numbers.

Each is found by its form, checked where it has a checksum, and replaced by a placeholder. Numbers with a meaning of
their own stay: addresses of private, local and documentation networks (RFC 6890), numbers of versions and sections.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

_FILE_SUFFIXES: Final = ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js")  # logo@2x.png
# Named, because `IPv4Address.is_global` differs between patch releases of Python.
_KEPT_IPV4: Final = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
_DOCUMENTATION_IPV6: Final = IPv6Network("2001:db8::/32")

_EMAIL_NAME = re.compile(r"[A-Za-z0-9._%+-]{1,64}\Z")
_EMAIL_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9-])")
# Patterns that begin with a literal are searched for at the speed of memchr; they say whether a slower one is needed.
_MAYBE_IPV4 = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d")
_MAYBE_IPV6 = re.compile(r":(?<=[23][0-9A-Fa-f]{3}:)[0-9A-Fa-f:]")
# What must not stand before a number is looked for behind its first digit, so that the search runs from digit to digit.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"[1-9](?<![\w.+-][1-9])[0-9]{{0,2}}\.(?:{_OCTET}\.){{2}}{_OCTET}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(  # global addresses begin with 2 or 3
    r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)", re.ASCII
)
_NUMBERED_BEFORE = re.compile(
    r"(?:version|release|\bver\.?|\bv|section|\bsec\.|chapter|clause|paragraph|article|appendix|figure|table|§|版本号?|版|第)"
    r"\s{0,3}(?:[:：=]|为|是|is)?\s{0,3}\Z",
    re.IGNORECASE,
)
_NUMBERED_BEHIND = re.compile(r"\s{0,2}[版节章条款]")
_ADDRESS_BEFORE = re.compile(
    r"(?:(?:\bip(?:v4)?|\bdns|address|server|\bhost|gateway|\bping|地址|服务器|主机|网关)\s{0,3}(?:[:：=]|为|是|is)?\s{0,3}|//|@)\Z",
    re.IGNORECASE,
)
_ADDRESS_BEHIND = re.compile(r"[:/][0-9]")
_CONTEXT: Final = 24
_LOW_PART: Final = 32
"""Versions and sections have four parts below this; of all addresses one in 4,096."""
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"(?:\+?86[- ]?)?1[3-9][0-9](?:[- ]?[0-9]{4}){2}"  # Chinese mobile
    r"|0[1-9][0-9]{1,2}-[0-9]{7,8}"  # Chinese landline with its area code
    r"|(?:\+?1[-. ]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4}"  # North American
    r"|\+[1-9][0-9]{0,2}(?:[-. ]?(?:\([0-9]{1,4}\)|[0-9]{2,4})){2,5}"  # international
    r")(?![\w-]|\.\d)",
    re.ASCII,  # a Chinese character before a number is no part of it
)
_CARD = re.compile(r"(?<![\w.+-])[2-6](?:[ -]?[0-9]){11,17}[0-9](?![\w-]|\.\d)", re.ASCII)
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z])[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
    r"(?![0-9A-Za-z])"
)
_IDENTITY_WEIGHTS: Final = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


class Masker:
    """Replaces the chosen kinds of personal data by a placeholder, and counts them."""

    def __init__(self, kinds: Iterable[str], placeholder: str) -> None:
        chosen = frozenset(kinds)
        self._masks = [(kind, mask, _filled(placeholder, kind)) for kind, mask in MASKS.items() if kind in chosen]
        self.masked: Counter[str] = Counter()
        """How many of each kind were replaced so far."""

    def __call__(self, text: str) -> str:
        """The text with placeholders."""
        for kind, mask, placeholder in self._masks:
            text, num_masked = mask(text, placeholder)
            if num_masked:
                self.masked[kind] += num_masked
        return text


def check_placeholder(placeholder: str) -> None:
    """Refuse a placeholder that could itself be taken for personal data or HTML.

    Raises:
        ValueError: with the reason, to be put after the name of the setting.
    """
    if not placeholder or not re.fullmatch(r"[^\d@.:&<>{}\x00-\x1f]*", placeholder.replace("{kind}", "")):
        raise ValueError("must be not empty, without digits and @ . : & < >, and no braces but {kind}")


def mask_emails(text: str, placeholder: str) -> tuple[str, int]:
    """Replace e-mail addresses, found from their @ signs."""
    pieces: list[str] = []
    copied = 0
    at = text.find("@")
    while at >= 0:
        name = _EMAIL_NAME.search(text, max(copied, at - 64), at)
        host = _EMAIL_HOST.match(text, at + 1) if name else None
        # git@github.com:a/b is how a repository is reached.
        if name and name[0] != "git" and host and host[1].lower() not in _FILE_SUFFIXES:
            pieces += (text[copied : name.start()], placeholder)
            copied = host.end()
        at = text.find("@", max(at + 1, copied))
    return ("".join((*pieces, text[copied:])), len(pieces) // 2) if pieces else (text, 0)


def mask_ips(text: str, placeholder: str) -> tuple[str, int]:
    """Replace public IPv4 and IPv6 addresses that are no numbers of versions or sections."""
    num_masked = 0
    if _MAYBE_IPV4.search(text):
        text, num_masked = _replace(_IPV4, text, placeholder, _is_public_ipv4)
    if _MAYBE_IPV6.search(text):
        text, num_ipv6 = _replace(_IPV6, text, placeholder, _is_public_ipv6)
        num_masked += num_ipv6
    return text, num_masked


def mask_phones(text: str, placeholder: str) -> tuple[str, int]:
    """Replace Chinese mobile and landline, North American, and international phone numbers."""
    return _replace(_PHONE, text, placeholder, lambda match: 10 <= len(_digits(match[0])) <= 15)


def mask_cards(text: str, placeholder: str) -> tuple[str, int]:
    """Replace payment card numbers with a right check digit (Luhn)."""
    return _replace(_CARD, text, placeholder, lambda match: is_card(_digits(match[0])))


def mask_identities(text: str, placeholder: str) -> tuple[str, int]:
    """Replace Chinese identity numbers with a right check digit (GB 11643)."""
    return _replace(_IDENTITY, text, placeholder, lambda match: is_identity(match[0]))


MASKS: Final[dict[str, Callable[[str, str], tuple[str, int]]]] = {
    "email": mask_emails,
    "ip": mask_ips,
    "card": mask_cards,
    "id": mask_identities,
    "phone": mask_phones,
}
"""In the order of masking: a phone number could stand inside the longer ones."""


def is_card(digits: str) -> bool:
    """Whether a Luhn check digit ends the digits."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_identity(number: str) -> bool:
    """Whether the check character of GB 11643 ends the 18 characters."""
    total = sum(weight * int(digit) for weight, digit in zip(_IDENTITY_WEIGHTS, number))
    return "10X98765432"[total % 11] == number[-1].upper()


def _filled(placeholder: str, kind: str) -> str:
    return placeholder.replace("{kind}", kind.upper())


def _digits(number: str) -> str:
    return re.sub("[^0-9]", "", number)


def _replace(
    pattern: re.Pattern[str], text: str, placeholder: str, is_right: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    num_masked = 0

    def replacement(match: re.Match[str]) -> str:
        nonlocal num_masked
        if not is_right(match):
            return match[0]
        num_masked += 1
        return placeholder

    return pattern.sub(replacement, text), num_masked


def _is_public_ipv4(match: re.Match[str]) -> bool:
    if _is_numbering(match):
        return False
    try:
        address = IPv4Address(match[0])
    except AddressValueError:
        return False
    return not any(address in network for network in _KEPT_IPV4)


def _is_numbering(match: re.Match[str]) -> bool:
    """Whether four numbers rather count versions or sections, by the words around them and by their size."""
    text, start, end = match.string, match.start(), match.end()
    around = (text, max(0, start - _CONTEXT), start)
    if _NUMBERED_BEFORE.search(*around) or _NUMBERED_BEHIND.match(text, end):
        return True
    parts = set(map(int, match[0].split(".")))
    # 1.1.1.1 and 8.8.8.8 are well-known servers.
    if len(parts) == 1 or max(parts) >= _LOW_PART:
        return False
    return not (_ADDRESS_BEFORE.search(*around) or _ADDRESS_BEHIND.match(text, end))


def _is_public_ipv6(match: re.Match[str]) -> bool:
    try:
        address = IPv6Address(match[0])
    except AddressValueError:
        return False
    return address not in _DOCUMENTATION_IPV6
