"""Meta's layout: bytes survive both ways, and what is written is what Meta's own code computes."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gguf_kit import tiny_base
from kit import config_of
from ship_kit import QUICK, base_in, content, report_of, same_bytes, tensors_of
from vicuna.commands.convert import run
from vicuna.convert.meta import MetaWeights, params_of
from vicuna.convert.pth import PthWriter
from vicuna.errors import SettingsError, UserError

IDS = torch.tensor([5, 9, 200, 31, 7, 11, 60])


def converted(source: Path, target: Path, *words: Any) -> Path:
    given = ["--model", str(source), "--output_dir", str(target), *map(str, words), *QUICK]
    assert run(given) == 0
    return target


# -- an independent reference: the forward pass of Meta's published code, over its own files ----


def joined(folder: Path, third: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    params = json.loads((folder / "params.json").read_text())
    shards = [torch.load(f, weights_only=True) for f in sorted(folder.glob("consolidated.*.pth"))]
    column = ("wq", "wk", "wv", "w1", "w3", "output")
    whole = {}
    for key in shards[0]:
        parts = [s[key] for s in shards]
        part = key.split(".")[-2]
        if part in column or (part == "tok_embeddings" and third):
            whole[key] = torch.cat(parts, 0)
        elif part in ("wo", "w2", "tok_embeddings"):
            whole[key] = torch.cat(parts, 1)
        else:
            whole[key] = parts[0]
    return params, {k: v.float() for k, v in whole.items()}


def metas_scores(params: dict[str, Any], w: dict[str, Tensor]) -> Tensor:
    """Scores (T, V): rotary embedding on neighbouring pairs, as complex numbers."""
    heads, dim = params["n_heads"], params["dim"]
    kv_heads = params.get("n_kv_heads", heads)
    size, t = dim // heads, len(IDS)
    freqs = 1.0 / params.get("rope_theta", 10000.0) ** (torch.arange(0, size, 2).float() / size)
    turns = torch.polar(torch.ones(t, size // 2), torch.outer(torch.arange(t).float(), freqs))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(t, -1, size // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).reshape(t, -1, size)

    x = w["tok_embeddings.weight"][IDS]
    mask = torch.full((t, t), -math.inf).triu(1)
    for n in range(params["n_layers"]):
        at = f"layers.{n}."
        h = norm(x, w[f"{at}attention_norm.weight"])
        q, k, v = (F.linear(h, w[f"{at}attention.w{p}.weight"]).view(t, -1, size) for p in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(t, dim)
        x = x + F.linear(mixed, w[f"{at}attention.wo.weight"])
        h = norm(x, w[f"{at}ffn_norm.weight"])
        gate, up = (F.linear(h, w[f"{at}feed_forward.{p}.weight"]) for p in ("w1", "w3"))
        x = x + F.linear(F.silu(gate) * up, w[f"{at}feed_forward.w2.weight"])
    return F.linear(norm(x, w["norm.weight"]), w["output.weight"])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied"])
def test_metas_own_computation_gives_the_same_scores(
    tmp_path: Path, family: str, shards: int
) -> None:
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    model = tiny_base(tmp_path / "hf", family, **(theta if family == "llama" else {}))
    folder = converted(tmp_path / "hf", tmp_path / "meta", "--to", "meta", "--num_shards", shards)
    with torch.no_grad():
        wanted = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(metas_scores(*joined(folder)), wanted, atol=2e-4, rtol=1e-3)


# -- both ways ----


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_every_byte_comes_back(tmp_path: Path, shards: int, tied: bool) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8} if shards == 8 else {}
    if shards == 4:
        heads = {"num_key_value_heads": 4}
    base = base_in(tmp_path / "hf", "llama", tie_word_embeddings=tied, **heads)
    folder = converted(base, tmp_path / "meta", "--to", "meta", "--num_shards", shards)
    assert len(list(folder.glob("*.pth"))) == shards
    assert report_of(folder)["notes"] == []
    back = converted(folder, tmp_path / "back", "--to", "hf")
    assert same_bytes(tensors_of(back), tensors_of(base))
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((back / name).read_text()) == json.loads((base / name).read_text())
    for where in (folder, back):
        report = report_of(where)
        assert report["passed"]
        assert report["comparison"]["zh"]["largest_logit_difference"] == 0


def test_files_are_cut_anew(tmp_path: Path) -> None:
    base = base_in(tmp_path / "hf")
    one = converted(base, tmp_path / "1", "--to", "meta")
    four = converted(one, tmp_path / "4", "--to", "meta", "--num_shards", "4", "--no-verify")
    again = converted(four, tmp_path / "1b", "--to", "meta", "--no-verify")
    name = "consolidated.00.pth"
    assert (one / name).read_bytes() == (again / name).read_bytes()
    assert (four / name).stat().st_size < (one / name).stat().st_size / 2


def test_a_large_vocabulary_is_cut_along_its_tokens_as_llama_3s(tmp_path: Path) -> None:
    base = base_in(
        tmp_path / "hf", hidden_size=8, num_hidden_layers=1, num_key_value_heads=2,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    grown = tensors_of(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.randn(128_000, 8).bfloat16()
    from safetensors.torch import save_file

    save_file(grown, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 128_000}
    (base / "config.json").write_text(json.dumps(config))
    folder = converted(base, tmp_path / "m", "--to", "meta", "--num_shards", 2, "--no-verify")
    part = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert part["tok_embeddings.weight"].shape == (64_000, 8)
    back = converted(folder, tmp_path / "b", "--to", "hf", "--no-verify")
    assert same_bytes(tensors_of(back), grown)


def released(folder: Path, params: dict[str, Any], shards: int = 2) -> Path:
    """Files as Meta released them: params.json alone says what the model is, with a buffer."""
    base = base_in(folder / "hf", "llama")
    meta = converted(base, folder / "7B", "--to", "meta", "--num_shards", shards, "--no-verify")
    for path in meta.iterdir():
        if path.suffix != ".pth":
            path.unlink()
    for path in meta.glob("*.pth"):
        loaded = torch.load(path, weights_only=True)
        torch.save({**loaded, "rope.freqs": torch.ones(4)}, path)
    own = {"dim": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
    (meta / "params.json").write_text(json.dumps({**own, "multiple_of": 8, **params}))
    return meta


@pytest.mark.parametrize(
    ("params", "context", "theta"),
    [({}, 2048, 1e4), ({"norm_eps": 1e-5}, 4096, 1e4), ({"rope_theta": 5e5}, 2048, 5e5)],
)
def test_a_release_is_told_by_its_params(
    tmp_path: Path, params: dict[str, Any], context: int, theta: float
) -> None:
    meta = released(tmp_path, params)
    words = ["--to", "hf", "--tokenizer", tmp_path / "hf"]
    back = converted(meta, tmp_path / "back", *words)
    config = json.loads((back / "config.json").read_text())
    assert config["max_position_embeddings"] == context
    assert config["rope_parameters"]["rope_theta"] == theta
    assert same_bytes(tensors_of(back), tensors_of(tmp_path / "hf"))
    notes = " ".join(report_of(back)["notes"])
    assert "rope.freqs" in notes
    assert str(context) in notes
    from vicuna.model.load import Chosen, load_base

    loaded = load_base(back, Chosen("fp32", ""), torch.device("cpu"))
    assert loaded.config.rms_norm_eps == params.get("norm_eps", 1e-6)


def test_llama_31s_scaled_positions_survive(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    base = base_in(tmp_path / "hf", rope_parameters=rope, max_position_embeddings=131072)
    folder = converted(base, tmp_path / "m", "--to", "meta")
    params = json.loads((folder / "params.json").read_text())
    assert params["use_scaled_rope"] is True
    (folder / "hf_config.json").unlink()
    back = converted(folder, tmp_path / "b", "--to", "hf")
    found = json.loads((back / "config.json").read_text())
    assert found["rope_parameters"] == rope
    assert found["max_position_embeddings"] == 131072


@pytest.mark.parametrize(
    ("hidden", "width", "wanted"),
    [
        (4096, 11008, {"multiple_of": 256}), (5120, 13824, {"multiple_of": 256}),
        (8192, 28672, {}), (4096, 14336, {}), (576, 1536, {"multiple_of": 256}), (32, 48, {}),
        (2048, 8192, {}), (3072, 8191, {}),
    ],
)  # fmt: skip
def test_the_width_of_the_feed_forward_follows_metas_rule(
    hidden: int, width: int, wanted: dict[str, int]
) -> None:
    config = config_of("llama", hidden_size=hidden, intermediate_size=width).to_dict()
    params = params_of(config, "")
    inner = int(2 * 4 * hidden / 3)
    inner = int(params.get("ffn_dim_multiplier", 1) * inner)
    multiple = params["multiple_of"]
    assert multiple * ((inner + multiple - 1) // multiple) == width
    assert wanted.items() <= params.items()


# -- other layouts ----


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    base = base_in(tmp_path / "hf")
    wanted = tensors_of(base)
    (base / "model.safetensors").unlink()
    names, files = sorted(wanted), ("pytorch_model-00001.bin", "pytorch_model-00002.bin")
    for half, file in zip((names[:9], names[9:]), files):
        torch.save({n: wanted[n] for n in half}, base / file)
    places = {n: files[n in names[9:]] for n in names}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    back = converted(base, tmp_path / "st", "--to", "hf", "--max_shard_size", "20KB")
    assert same_bytes(tensors_of(back), wanted)
    assert not list(back.glob("*.bin*"))
    (base / files[1]).unlink()
    with pytest.raises(UserError, match="a file of the weights is missing"):
        converted(base, tmp_path / "no", "--to", "hf")


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    from vicuna.export.gguf_writer import write_base

    base = base_in(tmp_path / "hf")
    write_base(base, tmp_path / "x.gguf", "bf16")
    back = converted(tmp_path / "x.gguf", tmp_path / "back", "--to", "hf")
    ours, theirs = tensors_of(back), tensors_of(base)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if "norm" not in k)
    assert report_of(back)["from"] == "gguf"
    assert not (back / "manifest.json").exists()


# -- refused ----


@pytest.mark.parametrize("magic", [b"lmgg", b"tjgg", b"fmgg", b"algg"])
def test_old_files_are_named_with_the_way_out(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "ggml-model-q4_0.bin"
    path.write_bytes(magic + b"\1\0\0\0" * 20)
    with pytest.raises(UserError, match=r"2023(.|\n)*(vicuna export gguf|PEFT's format)"):
        converted(path, tmp_path / "x", "--to", "hf")


def damaged(meta: Path, change: Any) -> None:
    path = meta / "consolidated.01.pth"
    loaded = dict(torch.load(path, weights_only=True))
    change(loaded)
    torch.save(loaded, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.1.attention.wo.weight"), "lacks layers.1.attention.wo"),
        (lambda t: t.update({"norm.weight": t["norm.weight"] + 1}), "differs between the files"),
        (lambda t: t.update({"output.weight": t["output.weight"][:-1]}), "differs between"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].float()}), "differs between"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    tmp_path: Path, change: Any, said: str
) -> None:
    meta = released(tmp_path, {})
    damaged(meta, change)
    with pytest.raises(UserError, match=said):
        converted(meta, tmp_path / "x", "--to", "hf", "--tokenizer", tmp_path / "hf")
    assert not (tmp_path / "x").exists()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    meta = released(tmp_path, {})
    with pytest.raises(UserError, match="--tokenizer"):
        converted(meta, tmp_path / "x", "--to", "hf")
    (meta / "params.json").write_text('{"dim": 32, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}')
    with pytest.raises(UserError, match=r"lacks layers\.2"):
        MetaWeights(meta)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match=r"expected consolidated\.00\.pth"):
        MetaWeights(meta)
    from vicuna.model.base import locate

    with pytest.raises(UserError, match="vicuna convert"):
        locate(str(meta))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen2", {}, "type qwen2"), ("llama", {"head_dim": 16}, "heads of 16"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         "scaled by 'linear'"),
    ],
)  # fmt: skip
def test_what_the_layout_has_no_place_for_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    tiny_base(tmp_path / "hf", family, **changes)
    with pytest.raises(UserError, match=said):
        converted(tmp_path / "hf", tmp_path / "x", "--to", "meta")
    assert not (tmp_path / "x").exists()


def test_a_number_of_files_that_does_not_divide_is_refused_or_told(tmp_path: Path) -> None:
    base = base_in(tmp_path / "hf", num_attention_heads=4, num_key_value_heads=1)
    folder = converted(base, tmp_path / "x", "--to", "meta", "--num_shards", 2)
    assert "Meta's own code cannot run them" in report_of(folder)["notes"][0]
    base = base_in(tmp_path / "odd", intermediate_size=50)
    with pytest.raises(UserError, match="cannot be cut into 4"):
        converted(base, tmp_path / "y", "--to", "meta", "--num_shards", 4)
    with pytest.raises(SettingsError, match="max_shard_size"):
        converted(base, tmp_path / "y", "--to", "hf", "--num_shards", 2)


def test_sources_stay_and_results_are_not_overwritten(tmp_path: Path) -> None:
    base = base_in(tmp_path / "hf")
    before = content(base)
    folder = converted(base, tmp_path / "m", "--to", "meta", "--no-verify")
    with pytest.raises(UserError, match="--force"):
        converted(base, folder, "--to", "meta")
    converted(base, folder, "--to", "meta", "--num_shards", "2", "--force", "--no-verify")
    assert len(list(folder.glob("*.pth"))) == 2
    assert content(base) == before


# -- the files themselves ----


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
            st.lists(st.integers(1, 5), min_size=1, max_size=3),
        ),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_any_tensors_open_in_torch(
    tmp_path_factory: pytest.TempPathFactory, kinds: Iterable[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    table = [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    with PthWriter(path, table) as f:
        for name, tensor in tensors.items():
            f.write(name, tensor)
    for mapped in (False, True):
        assert same_bytes(torch.load(path, weights_only=True, mmap=mapped), tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with path.open("rb") as raw:
        data = raw.read()
    reader = torch._C.PyTorchFileReader(str(path))
    for i, tensor in enumerate(tensors.values()):
        at = reader.get_record_offset(f"data/{i}")
        assert at % 64 == 0
        wanted = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[at : at + len(wanted)] == wanted
