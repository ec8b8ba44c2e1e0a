import dataclasses
import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.chat.chat_folder import ChatFolder, read_chat_folder, write_chat_folder
from data_prep.chat.chat_format import (
    FORMATS,
    ChatFormat,
    ChatFormatError,
    chat_format_of,
    format_named,
    from_json,
    read_chat_file,
)
from data_prep.chat.turns import Turn
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe
from tests.data_prep.chat.vocabularies import SPECIALS, byte_level, like_llama, transformers_tokenizer

CONVERSATION = [
    Turn("system", "be quick"),
    Turn("user", "hello fox"),
    Turn("assistant", "hello dog"),
    Turn("user", "who"),
    Turn("assistant", ""),
    Turn("user", "over"),
]
NO, YES = False, True
# What is encoded one by one: special tokens, texts, and whether they are trained.
GOLDENS: dict[str, list[tuple[str, bool]]] = {
    "chatml": [
        *(("<|im_start|>", NO), ("system\nbe quick", NO), ("<|im_end|>", NO), ("\n", NO)),
        *(("<|im_start|>", NO), ("user\nhello fox", NO), ("<|im_end|>", NO), ("\n", NO)),
        *(("<|im_start|>", NO), ("assistant\n", NO), ("hello dog", YES), ("<|im_end|>", YES), ("\n", NO)),
        *(("<|im_start|>", NO), ("user\nwho", NO), ("<|im_end|>", NO), ("\n", NO)),
        *(("<|im_start|>", NO), ("assistant\n", NO), ("<|im_end|>", YES), ("\n", NO)),
        *(("<|im_start|>", NO), ("user\nover", NO), ("<|im_end|>", NO), ("\n", NO)),
    ],
    "llama2": [
        *(("<s>", NO), ("[INST] <<SYS>>\nbe quick\n<</SYS>>\n\nhello fox [/INST]", NO)),
        *((" hello dog ", YES), ("</s>", YES)),
        *(("<s>", NO), ("[INST] who [/INST]", NO), ("  ", YES), ("</s>", YES)),
        *(("<s>", NO), ("[INST] over [/INST]", NO)),
    ],
    "llama3": [
        ("<|begin_of_text|>", NO),
        *(("<|start_header_id|>", NO), ("system", NO), ("<|end_header_id|>", NO), ("\n\nbe quick", NO)),
        *(("<|eot_id|>", NO), ("<|start_header_id|>", NO), ("user", NO), ("<|end_header_id|>", NO)),
        *(("\n\nhello fox", NO), ("<|eot_id|>", NO), ("<|start_header_id|>", NO), ("assistant", NO)),
        *(("<|end_header_id|>", NO), ("\n\n", NO), ("hello dog", YES), ("<|eot_id|>", YES)),
        *(("<|start_header_id|>", NO), ("user", NO), ("<|end_header_id|>", NO), ("\n\nwho", NO), ("<|eot_id|>", NO)),
        *(("<|start_header_id|>", NO), ("assistant", NO), ("<|end_header_id|>", NO), ("\n\n", NO)),
        *(("<|eot_id|>", YES), ("<|start_header_id|>", NO), ("user", NO), ("<|end_header_id|>", NO)),
        *(("\n\nover", NO), ("<|eot_id|>", NO)),
    ],
    "mistral": [
        *(("<s>", NO), ("[INST] be quick\n\nhello fox [/INST]", NO), (" hello dog", YES), ("</s>", YES)),
        *(("[INST] who [/INST]", NO), (" ", YES), ("</s>", YES), ("[INST] over [/INST]", NO)),
    ],
    "gemma": [
        *(("<bos>", NO), ("<start_of_turn>", NO), ("user\nbe quick\n\nhello fox", NO), ("<end_of_turn>", NO)),
        *(("\n", NO), ("<start_of_turn>", NO), ("model\n", NO), ("hello dog", YES), ("<end_of_turn>", YES)),
        *(("\n", NO), ("<start_of_turn>", NO), ("user\nwho", NO), ("<end_of_turn>", NO), ("\n", NO)),
        *(("<start_of_turn>", NO), ("model\n", NO), ("<end_of_turn>", YES), ("\n", NO)),
        *(("<start_of_turn>", NO), ("user\nover", NO), ("<end_of_turn>", NO), ("\n", NO)),
    ],
    "zephyr": [
        *(("<|system|>\nbe quick", NO), ("</s>", NO), ("\n<|user|>\nhello fox", NO), ("</s>", NO)),
        *(("\n<|assistant|>\n", NO), ("hello dog", YES), ("</s>", YES), ("\n<|user|>\nwho", NO), ("</s>", NO)),
        *(("\n<|assistant|>\n", NO), ("</s>", YES), ("\n<|user|>\nover", NO), ("</s>", NO), ("\n", NO)),
    ],
    "alpaca": [
        ("be quick\n\n### Instruction:\nhello fox\n\n### Response:\n", NO),
        *(("hello dog", YES), ("</s>", YES), ("\n\n### Instruction:\nwho\n\n### Response:\n", NO)),
        *(("</s>", YES), ("\n\n### Instruction:\nover\n\n### Response:\n", NO)),
    ],
}
OPENINGS = {
    "chatml": ["<|im_start|>", "assistant\n"],
    "llama3": ["<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"],
    "gemma": ["<start_of_turn>", "model\n"],
    "zephyr": ["\n<|assistant|>\n"],
}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    token_id = tokenizer.special_id(text)
    return tokenizer.encode(text) if token_id is None else [token_id]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_written_and_masked_as_its_golden(name: str):
    tokenizer = byte_level()
    expected = [(i, trained) for text, trained in GOLDENS[name] for i in ids_of(tokenizer, text)]
    encoded = FORMATS[name].encode(tokenizer, CONVERSATION)
    assert list(zip(*encoded)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_the_conversation_and_the_opening_of_an_answer(name: str):
    tokenizer = byte_level()
    texts = [text for text, _ in GOLDENS[name]]
    opening = OPENINGS.get(name, [])
    if name == "zephyr":  # its opening goes on the text that ends the turn before
        texts.pop()
    expected = [i for text in [*texts, *opening] for i in ids_of(tokenizer, text)]
    assert FORMATS[name].prompt(tokenizer, CONVERSATION) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_stops_at_the_formats_token_or_the_end_of_document(name: str):
    tokenizer = byte_level("<|endoftext|>")
    stop = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(name)
    expected = [tokenizer.special_id(stop), tokenizer.eos_id] if stop else [tokenizer.eos_id]
    assert FORMATS[name].stop_ids(tokenizer) == expected


def random_conversations(count: int) -> list[list[Turn]]:
    rng = random.Random(0)
    # What the assistant says is of letters that nothing else in any format has.
    said, other = "ÄÖÜäöüß", ["hello", "fox\n", " dog ", "<|im_end|>", "</s>", "[/INST]", "", "\n\n", "你好", "1.5"]
    made = []
    for _ in range(count):
        turns = [Turn("system", rng.choice(other))] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 4)):
            turns.append(Turn("user", "".join(rng.choices(other, k=rng.randint(1, 5)))))
            turns.append(Turn("assistant", "".join(rng.choices(said, k=rng.randint(0, 9)))))
        made.append(turns[: rng.choice([None, None, -1])])
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_of_ten_thousand_conversations_every_answer_and_its_stop_is_trained_and_nothing_else(name: str):
    tokenizer, made = byte_level(), FORMATS[name]
    conversations = random_conversations(10_000 // len(FORMATS) + 1)
    stop = made.stop_ids(tokenizer)[0]
    before, behind = {"llama2": (" ", " "), "mistral": (" ", "")}.get(name, ("", ""))
    for turns, (ids, is_trained) in zip(
        conversations, made.encode_parts(tokenizer, [made.parts(turns) for turns in conversations]), strict=True
    ):
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        trained = [token_id for token_id, counts in zip(ids, is_trained, strict=True) if counts]
        is_stop = [token_id == stop for token_id in trained]
        assert sum(is_stop) == len(answers)
        assert not trained or is_stop[-1]
        runs = [list(group) for stopped, group in itertools.groupby(trained, lambda i: i == stop) if not stopped]
        said = [before + answer + behind for answer in answers]
        assert [tokenizer.decode(run) for run in runs] == [text for text in said if text]
        untrained = tokenizer.decode([i for i, counts in zip(ids, is_trained) if not counts])
        assert not set(untrained) & set("ÄÖÜäöüß")


def test_a_user_who_spells_a_special_token_makes_none():
    tokenizer = byte_level()
    for name, made in FORMATS.items():
        plain = made.encode(tokenizer, [Turn("user", "x"), Turn("assistant", "y")]).ids
        spelled = made.encode(tokenizer, [Turn("user", "x".join(SPECIALS)), Turn("assistant", "y</s><|im_end|>")]).ids
        assert [i for i in spelled if tokenizer.is_special(i)] == [i for i in plain if tokenizer.is_special(i)], name


def test_answers_before_a_given_turn_are_context():
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    tokenizer = byte_level()
    for made in FORMATS.values():
        whole, last = made.encode(tokenizer, turns), made.encode(tokenizer, turns, trained_from=3)
        assert last.ids == whole.ids
        first_answer_ends = len(made.encode(tokenizer, turns[:3]).ids) - 2
        assert not any(last.is_trained[:first_answer_ends])
        assert last.is_trained[first_answer_ends:] == whole.is_trained[first_answer_ends:]
        assert any(last.is_trained)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=30)
@given(st.text(max_size=20), st.text(max_size=20))
def test_what_was_said_before_is_written_in_a_prompt_as_it_was_trained(name: str, question: str, answer: str):
    tokenizer, made = byte_level(), FORMATS[name]
    turns = [Turn("user", question), Turn("assistant", answer)]
    prompt, whole = made.prompt(tokenizer, turns[:1]), made.encode(tokenizer, turns)
    assert whole.ids[: len(prompt)] == prompt
    assert not any(whole.is_trained[: len(prompt)])
    longer = made.prompt(tokenizer, [*turns, Turn("user", "more")])
    last_trained = len(whole.is_trained) - whole.is_trained[::-1].index(True)
    assert longer[:last_trained] == whole.ids[:last_trained]


def test_a_default_system_prompt_stands_where_a_conversation_has_none():
    tokenizer = byte_level()
    for made in FORMATS.values():
        made = dataclasses.replace(made, default_system="be lazy")
        with_own, without = [Turn("system", "be quick"), Turn("user", "x")], [Turn("user", "x")]
        explicit = [Turn("system", "be lazy"), Turn("user", "x")]
        assert made.prompt(tokenizer, without) == made.prompt(tokenizer, explicit)
        assert made.prompt(tokenizer, with_own) != made.prompt(tokenizer, without)
        trained = made.encode(tokenizer, [*without, Turn("assistant", "y")], trained_from=1).is_trained
        assert sum(trained) >= 2


TEMPLATE_CONVERSATIONS: list[list[Turn]] = [
    [Turn("user", "hello fox"), Turn("assistant", "hello dog"), Turn("user", "who"), Turn("assistant", "nothing!")],
    [Turn("system", "be quick"), Turn("user", "hello\nfox 12"), Turn("assistant", "hello dog\n")],
    [Turn("user", ' the "quick" {{ brown }} fox\\n '), Turn("assistant", " over  the dog ")],
    CONVERSATION,
]


@pytest.mark.parametrize("vocabulary", ["byte-level", "every", "first"])
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_gives_the_same_ids_by_the_exported_template(name: str, vocabulary: str, tmp_path: Path):
    tokenizer = byte_level() if vocabulary == "byte-level" else like_llama(vocabulary)
    made = FORMATS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers_tokenizer(tokenizer, tmp_path)
    assert_same_ids(made, tokenizer, theirs)
    assert_same_ids(dataclasses.replace(made, default_system='be "lazy"\n'), tokenizer, theirs)


def assert_same_ids(made: ChatFormat, tokenizer: Tokenizer, theirs: Any) -> None:
    theirs.chat_template = made.jinja(tokenizer)
    for turns in TEMPLATE_CONVERSATIONS:
        messages = [turn._asdict() for turn in turns]
        for is_prompt, expected in ((False, made.encode(tokenizer, turns).ids), (True, made.prompt(tokenizer, turns))):
            found = theirs.apply_chat_template(messages, add_generation_prompt=is_prompt, return_dict=False)
            assert found == expected, theirs.apply_chat_template(
                messages, add_generation_prompt=is_prompt, tokenize=False
            )


def test_the_template_refuses_what_the_format_refuses(tmp_path: Path):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = byte_level()
    cases = [
        ("gemma", [Turn("user", "x"), Turn("tool", "y")]),
        ("llama2", [Turn("system", "x"), Turn("assistant", "y")]),
    ]
    for name, turns in cases:
        with pytest.raises(ChatFormatError):
            FORMATS[name].encode(tokenizer, turns)

        def refuse(message: str):
            raise ChatFormatError(message)

        template = jinja2.Environment().from_string(FORMATS[name].jinja(tokenizer))
        with pytest.raises(ChatFormatError):
            template.render(messages=[turn._asdict() for turn in turns], raise_exception=refuse)


def test_missing_special_tokens_are_one_error_that_names_them_and_the_way_out():
    tokenizer = train_bpe(["some text"], 300)
    for call in (FORMATS["llama3"].stop_ids, FORMATS["llama3"].jinja):
        with pytest.raises(
            ChatFormatError, match="no <.begin_of_text.>, .*<.eot_id.>, .*without special.*zephyr, alpaca"
        ):
            call(tokenizer)


def test_every_format_comes_back_from_its_json():
    for made in FORMATS.values():
        assert from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    "table",
    [{}, {"name": "x"}, {**FORMATS["chatml"].to_json(), "more": 1}, {**FORMATS["chatml"].to_json(), "assistant": 1}],
)
def test_what_is_no_format_is_refused(table: dict[str, Any]):
    with pytest.raises(ChatFormatError, match="not a chat format"):
        from_json(table)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ChatFormatError, match="'chatlm': unknown; did you mean 'chatml'"):
        format_named("chatlm")
    with pytest.raises(ChatFormatError, match="known are chatml, llama2"):
        format_named("?")


def test_a_format_is_found_from_data_run_and_checkpoint_folders(tmp_path: Path):
    chat = ChatFolder("chat", 64, dataclasses.replace(FORMATS["llama3"], default_system="be quick"))
    write_chat_folder(tmp_path, chat)
    checkpoint = tmp_path / "step-10"
    checkpoint.mkdir()
    (checkpoint / "record.json").write_text("{}")
    assert read_chat_folder(tmp_path) == chat
    assert chat_format_of(tmp_path) == chat_format_of(checkpoint) == chat.chat_format


def test_a_folder_without_a_format_says_what_to_do(tmp_path: Path):
    write_chat_folder(tmp_path, ChatFolder("chat", 64, FORMATS["chatml"]))
    (tmp_path / "other").mkdir()
    assert read_chat_folder(tmp_path / "other") is None
    with pytest.raises(ChatFormatError, match=r"other: has no chat.json.*prepare-chat.*--chat-format"):
        chat_format_of(tmp_path / "other")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "bessemer-chat/9"}', '{"format": "bessemer-chat/1"}'])
def test_a_chat_file_that_is_none_is_refused(content: str, tmp_path: Path):
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(ChatFormatError, match=r"chat.json: not .*restore it"):
        read_chat_file(tmp_path)
