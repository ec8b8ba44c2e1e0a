"""Our models in lm-evaluation-harness, an optional extra (pip install lm-eval): its tasks, our engine.

    python -m evaluation.lm_eval_adapter run --model bessemer --model_args path=runs/demo --tasks T --include_path .

The arguments are lm-eval's own. It downloads what its tasks name; a task of local files needs no network:
`dataset_path: json`, `dataset_kwargs: {data_files: {test: /data/questions.jsonl}}`. Chat templates are ours to apply
(`evaluation.multiple_choice --chat`): lm-eval passes prompts as text, in which a special token is text like any other.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.engine import Sampling, complete_batch
from evaluation.log_likelihood import log_likelihoods
from evaluation.model_folder import load_model

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("evaluation.lm_eval_adapter needs lm-evaluation-harness: pip install lm-eval==0.4.13") from error


class BessemerLM(TemplateLM):
    """A run folder, checkpoint or Hugging Face folder as lm-eval's model."""

    def __init__(
        self, path: str, device: str = "auto", batch_size: int | str = 16, max_gen_toks: int = 256, **_others: Any
    ):
        super().__init__()
        self._loaded = load_model(path, device=device or "auto")
        self._batch_size = int(batch_size)
        self._max_new_tokens = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and stands before a text without context."""
        return self._loaded.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """The longest input."""
        return self._loaded.config.context_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """The ids of a text; our models were trained without a token before it."""
        return self._loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        # What is too long loses its beginning, as with lm-eval's own models.
        pairs = []
        for _, context, continuation in requests:
            room = max(1, self.max_length + 1 - len(continuation))
            pairs.append((context[-room:], continuation))
        found = log_likelihoods(self._loaded.model, pairs, batch_size=self._batch_size)
        return [(result.sum, result.is_greedy) for result in found]

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, window by window, each token once."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(number, make_disjoint_window(window)) for window in rolling]
        sums = [0.0] * len(requests)
        found = log_likelihoods(self._loaded.model, [pair for _, pair in windows], batch_size=self._batch_size)
        for (number, _), result in zip(windows, found, strict=True):
            sums[number] += result.sum
        return sums

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Writes on until one of each request's texts."""
        calls: list[tuple[Any, ...]] = [request.args for request in requests]
        alike: dict[str, list[int]] = defaultdict(list)
        for number, (_, settings) in enumerate(calls):
            alike[json.dumps(settings, sort_keys=True, default=str)].append(number)
        answers = [""] * len(calls)
        for numbers in alike.values():
            texts = self._written([calls[number][0] for number in numbers], calls[numbers[0]][1])
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _written(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        tokenizer, until = self._loaded.tokenizer, settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        holds_stop = [
            token_id
            for token_id, content in enumerate(tokenizer.token_contents())
            if any(stop.encode() in content for stop in stops)
        ]
        max_new_tokens = min(settings.get("max_gen_toks", self._max_new_tokens), self.max_length - 1)
        room = self.max_length - max_new_tokens
        answers = complete_batch(
            self._loaded.model,
            [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context in contexts],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(
                temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                top_p=settings.get("top_p"),
                top_k=settings.get("top_k"),
            ),
            stop_ids=[self.eot_token_id, *holds_stop],
            batch_size=self._batch_size,
        )
        texts = (tokenizer.decode(answer) for (answer,) in answers)
        return [min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """lm-eval's command line, which knows `--model bessemer`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("bessemer")(BessemerLM)
    if argv is not None:
        sys.argv[1:] = argv
    cli_evaluate()


if __name__ == "__main__":
    main()
