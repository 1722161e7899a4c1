import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from harness.activations.lm.contexts import special_tokens
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_tokenizer
from harness.activations.store.identity import _recipe, recipe, store_id
from harness.activations.store.paths import store_root
from harness.config import ActivationsConfig, SyntheticConfig
from harness.errors import UserError
from tests.activations.conftest import decoder, save_tokenizer
from tests.tiny import TINY


def test_the_same_content_elsewhere_is_the_same_store(tiny: ActivationsConfig, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "moved")
    copies = tmp_path / "texts"
    copies.mkdir()
    for number, path in enumerate(sorted(Path(tiny.text_paths[0]).parent.glob("*.txt"), reverse=True)):
        shutil.copy(path, copies / f"renamed-{number}.txt")
    moved = dataclasses.replace(tiny, model=str(tmp_path / "moved"), text_paths=[f"{copies}/*.txt"])
    assert store_id(moved) == store_id(tiny)
    assert str(tmp_path) not in json.dumps(recipe(moved))


def test_settings_that_change_no_row_are_left_out(tiny: ActivationsConfig) -> None:
    service = dataclasses.replace(tiny, shard_rows=77, lm_batch=3, lm_precision="bf16", dir="/elsewhere")
    assert store_id(service) == store_id(tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"hook": "mlp_out"},
        {"layer": 0},
        {"context": 8},
        {"drop_first_position": False},
        {"tokens": 2000},
        {"heldout_tokens": 200},
        {"seed": 1},
        {"dtype": "bf16"},
        {"lm_dtype": "bf16", "lm_precision": "auto"},
        {"outlier_factor": 10.0},
        {"text": "stdlib"},
    ],
    ids=str,
)
def test_every_setting_that_decides_rows_enters(tiny: ActivationsConfig, change: dict[str, object]) -> None:
    assert store_id(dataclasses.replace(tiny, **change)) != store_id(tiny)


def test_weights_tokenizer_and_text_enter_by_content(
    tiny: ActivationsConfig, models_on_disk: dict[str, Path], tmp_path: Path
) -> None:
    assert store_id(dataclasses.replace(tiny, model=str(models_on_disk["gpt2"]))) != store_id(tiny)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        changed = tmp_path / name.split(".")[0]
        shutil.copytree(tiny.model, changed)
        with (changed / name).open("ab") as file:
            file.write(b" ")
        assert store_id(dataclasses.replace(tiny, model=str(changed))) != store_id(tiny)
    (tmp_path / "a.txt").write_text("something else")
    assert store_id(dataclasses.replace(tiny, text_paths=[f"{tmp_path}/a.txt"])) != store_id(tiny)


def test_synthetic_identity_covers_the_dictionary(tiny: ActivationsConfig) -> None:
    base = ActivationsConfig(kind="synthetic")
    ids = {
        store_id(base),
        store_id(dataclasses.replace(base, seed=1)),
        store_id(dataclasses.replace(base, synthetic=SyntheticConfig(noise=0.1))),
        store_id(tiny),
    }
    assert len(ids) == 4
    assert store_id(dataclasses.replace(base, model="ignored", layer=3)) == store_id(base)


def test_a_hub_model_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(UserError, match=r"hub .* cannot be reached"):
        store_id(ActivationsConfig(model="somebody/something"))


def test_a_pinned_commit_needs_no_hub() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cfg = ActivationsConfig(model="somebody/something", revision=commit)
    assert recipe(cfg)["model"] == {"hub": "somebody/something", "commit": commit}


def test_store_root(tiny: ActivationsConfig) -> None:
    assert store_root(tiny, Path("runs")) == Path("runs/_activations")
    assert store_root(dataclasses.replace(tiny, dir="/data/acts"), Path("runs")) == Path("/data/acts")


@pytest.mark.parametrize(
    ("name", "hook", "changed"),
    [
        *(
            (name, hook, True)
            for name in ("bloom", "gemma2", "olmo2", "granite", "mpt")
            for hook in ("mlp_out", "attn_out")
        ),
        *((name, "mlp_out", False) for name in ("llama", "gpt2", "phi", "falcon parallel", "gptj", "qwen3")),
        *((name, "resid_post", False) for name in ("bloom", "gemma2", "granite")),
    ],
)
def test_stores_of_wrong_modules_have_other_names(
    tiny: ActivationsConfig, tmp_path: Path, name: str, hook: str, changed: bool
) -> None:
    decoder(name).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert ("hooked" in recipe(dataclasses.replace(tiny, model=str(tmp_path), hook=hook))) is changed


def test_only_markers_of_a_chat_change_the_name_for_what_is_dropped(tiny: ActivationsConfig, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "chat")
    cfg = dataclasses.replace(tiny, model=str(tmp_path / "chat"))
    assert "dropped_markers" not in recipe(cfg)
    save_tokenizer(tmp_path / "chat", additional_special_tokens=["w3", "w5", "[SEP]"])
    _recipe.cache_clear()
    assert recipe(cfg)["dropped_markers"] == ["w3", "w5"]
    tokenizer = load_tokenizer(locate(cfg))
    assert special_tokens(tokenizer).dropped == [0, 2, 3, *tokenizer.convert_tokens_to_ids(["w3", "w5"])]


@pytest.mark.parametrize(
    ("name", "content", "changed"),
    [
        ("a.txt", b"plain", False),
        ("a.txt", "with BOM".encode("utf-8-sig"), True),
        ("a.jsonl", b'{"text": "short"}', False),
        ("a.jsonl", b'{"text": "' + b"x" * 70_000 + b'"}', True),
    ],
)
def test_texts_that_give_other_documents_now_change_the_name(
    tiny: ActivationsConfig, tmp_path: Path, name: str, content: bytes, changed: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    cfg = dataclasses.replace(tiny, text_paths=[str(tmp_path / name)])
    assert ("documents" in recipe(cfg)["text"]) is changed


def test_rows_in_the_precision_that_is_asked_for(
    models_on_disk: dict[str, Path], text_files: Path, tmp_path: Path
) -> None:
    """A store of the same recipe in another precision leaves its name to the runs that read it."""
    from harness.launch import main

    words = [word for word in TINY if not word.startswith("activations")]
    lm = ("activations=lm", f"activations.model={models_on_disk['llama']}", "activations.layer=1")
    text = ("activations.text=files", f"activations.text_paths=[{text_files}/*.txt]", "activations.context=16")
    rows = ("activations.tokens=2000", "activations.heldout_tokens=512", f"out={tmp_path}")

    def launch(precision: str) -> set[str]:
        assert main([*words, *lm, *text, *rows, f"activations.lm_precision={precision}"]) == 0
        return {path.parent.name for path in tmp_path.glob("t/*/result.json")}

    first = launch("fp32")
    both = launch("bf16")
    assert launch("fp32") == launch("auto") == launch("bf16") == both and len(first) == 1 and len(both) == 2
    stores = [json.loads(path.read_text()) for path in tmp_path.glob("_activations/*/manifest.json")]
    assert sorted(store["description"]["precision"] for store in stores) == ["bf16", "fp32"]
