"""What the terminal and the server share: prompts that fit into the context, and answers as text while they come."""

from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.chat.chat_format import ChatFormat, chat_format_of, format_named
from data_prep.chat.turns import Turn
from data_prep.tokenizing.tokenizer import Tokenizer
from evaluation.engine import generate
from evaluation.model_folder import LoadedModel, load_model
from evaluation.sampling import GenerationError, Sampling
from evaluation.speculative import generate_speculative
from evaluation.text_sample import TextSample
from model.transformer import Transformer


class ChatError(ValueError):
    """A question that cannot be asked; the message says what to change."""


class Delta(NamedTuple):
    """What a step adds to one sample of an answer."""

    sample: int
    text: str
    num_tokens: int
    """Of these, those of a stop token are not counted."""
    end: Literal["stop", "length"] | None
    """Why the sample ends here: by itself or at a stop text, or for want of room."""


class Draft(NamedTuple):
    """What guesses the next tokens: a smaller model, or the text so far."""

    model: Transformer | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """How an answer is to be written."""

    sampling: Sampling
    max_new_tokens: int
    stop_ids: Collection[int]
    stop_texts: Sequence[str] = ()
    """Texts before which the answer ends."""
    lead: str = ""
    """What the model says before an answer begins, of its chat format."""
    num_samples: int = 1


def stream_answer(
    loaded: LoadedModel, prompt: Sequence[int], wish: Wish, draft: Draft | None = None
) -> Generator[list[Delta], None, None]:
    """Answers a prompt, yielding after each step what it adds; a draft writes a single sample.

    Raises:
        GenerationError: at once, the prompt or the wish cannot be computed; later, the logits are NaN.
    """
    if draft is not None:
        rounds = generate_speculative(
            loaded.model, draft.model, prompt, max_new_tokens=wish.max_new_tokens, sampling=wish.sampling,
            stop_ids=wish.stop_ids,
        )  # fmt: skip
        return _texts(([one.tokens] for one in rounds), loaded.tokenizer, wish)
    steps = generate(
        loaded.model, prompt, max_new_tokens=wish.max_new_tokens, sampling=wish.sampling, stop_ids=wish.stop_ids,
        num_samples=wish.num_samples,
    )  # fmt: skip
    return _texts(([[] if token is None else [token] for token in new] for new in steps), loaded.tokenizer, wish)


def _texts(steps: Iterable[list[list[int]]], tokenizer: Tokenizer, wish: Wish) -> Generator[list[Delta], None, None]:
    texts = [TextSample(tokenizer, wish.stop_texts) for _ in range(wish.num_samples)]
    leads = [wish.lead] * wish.num_samples

    def delta(i: int, text: str, num_tokens: int, end: Literal["stop", "length"] | None) -> Delta:
        if text:
            text, leads[i] = text.removeprefix(leads[i]), ""
        return Delta(i, text, num_tokens, end)

    for new in steps:
        deltas: list[Delta] = []
        for i, token in ((i, token) for i, tokens in enumerate(new) for token in tokens):
            if texts[i].has_ended:
                continue
            if token in wish.stop_ids:
                deltas.append(delta(i, texts[i].flush(), 0, "stop"))
            else:
                text = texts[i].feed(token)
                deltas.append(delta(i, text, 1, "stop" if texts[i].has_ended else None))
        yield deltas
        if all(text.has_ended for text in texts):
            return
    yield [delta(i, text.flush(), 0, "length") for i, text in enumerate(texts) if not text.has_ended]


def fitting_prompt(
    chat_format: ChatFormat, tokenizer: Tokenizer, turns: Sequence[Turn], *, context_length: int, max_new_tokens: int
) -> tuple[list[Turn], list[int]]:
    """The latest turns whose prompt leaves room for an answer, or at least a quarter of the context, and that prompt.

    The system's turn stays, and so does the last question, though it leave little room.

    Raises:
        ChatError: these two alone leave no room at all.
    """
    kept = list(turns)
    first = int(kept[0].role == "system")
    room = min(max_new_tokens, context_length // 4)
    while len(prompt := chat_format.prompt(tokenizer, kept)) + room > context_length:
        questions = [i for i in range(first + 1, len(kept)) if kept[i].role == "user"]
        if questions:
            del kept[first : questions[0]]
        elif len(prompt) < context_length:
            break
        else:
            raise ChatError(
                f"the question makes a prompt of {len(prompt)} tokens, which leaves no room in a context of "
                f"{context_length}; shorten it or the system prompt"
            )
    return kept, prompt


def usable_chat_format(loaded: LoadedModel, name: str) -> ChatFormat:
    """The chat format of that name, or of "auto" the model's own, which its tokenizer can write.

    Raises:
        ChatFormatError: there is none, or the tokenizer lacks its tokens.
    """
    chat_format = chat_format_of(loaded.path) if name == "auto" else format_named(name)
    chat_format.stop_ids(loaded.tokenizer)
    return chat_format


def load_draft(name: str, loaded: LoadedModel, device: str) -> Draft:
    """The draft that a path names; "lookup" is the text so far.

    Raises:
        GenerationError: it has another tokenizer than the model.
        ModelFolderError: see `load_model`.
    """
    if name == "lookup":
        return Draft(None)
    draft = load_model(Path(name), device=device)
    if draft.tokenizer.token_contents() != loaded.tokenizer.token_contents():
        raise GenerationError(
            f"{name}: its tokenizer is not that of {loaded.path}; choose a draft that was trained with the same one"
        )
    return Draft(draft.model)
