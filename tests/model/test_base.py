"""A base is found wherever it lies, or the mistake is named with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit import save_tokenizer, tiny_model
from vicuna.errors import UserError
from vicuna.model.base import locate
from vicuna.model.load import Chosen, load_base
from vicuna.model.vocabulary import load_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", vocab_size=340).save_pretrained(path)
    save_tokenizer(path)
    return path


def test_a_folder_is_itself(folder: Path) -> None:
    assert locate(str(folder)) == folder


def test_a_wrong_path_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean tiny-llama\?"):
        locate(str(folder.with_name("tiny-lama")))


def test_a_misspelt_embedded_base_is_named() -> None:
    with pytest.raises(UserError, match=r"did you mean smollm2-135m\?"):
        locate("smolm2-135m")


@pytest.mark.parametrize("name", ["./none", "/none/such/folder", "a/b/c", "全新模型"])
def test_what_is_no_model_is_refused_with_the_ways_there_are(name: str) -> None:
    with pytest.raises(UserError, match="hub id such as"):
        locate(name)


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"--model owner/base --adapter {tmp_path}"):
        locate(str(tmp_path))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        locate(str(tmp_path))


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="broken"):
        locate(str(tmp_path))


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    with pytest.raises(UserError, match="BertForMaskedLM is not a causal"):
        locate(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="folder that holds"):
        locate(str(tmp_path / "model.bin"))


def test_a_damaged_gguf_is_refused_and_leaves_nothing(tmp_path: Path, session_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    with pytest.raises(UserError, match="damaged"):
        locate(str(tmp_path / "broken.gguf"))
    assert not list(session_cache.rglob("*broken*"))


# -- GGUF ----


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A Llama in GGUF, q and k in llama.cpp's order of rows."""
    import gguf

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = sorted(words["model"]["vocab"], key=words["model"]["vocab"].get)
    special = {t["content"] for t in words["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if p in special else 1 for p in pieces])
    writer.add_token_merges([" ".join(m) for m in words["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        rows = tensor.float()
        for part, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                shape = rows.shape
                rows = rows.view(n, 2, shape[0] // n // 2, -1).transpose(1, 2).reshape(shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(rows.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "camel.gguf"
    model = tiny_model("llama-gqa-tied", vocab_size=340, tie_word_embeddings=False)
    write_gguf(path, model, save_tokenizer(path.parent / "tokenizer"))
    assert session_cache
    return path


def test_a_gguf_file_is_converted_with_equal_logits(converted: Path) -> None:
    found = load_base(locate(str(converted)), Chosen("fp32", ""), torch.device("cpu"))
    model = tiny_model("llama-gqa-tied", vocab_size=340, tie_word_embeddings=False)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        wanted = model.bfloat16().float()(ids).logits
        torch.testing.assert_close(found(ids).logits, wanted, rtol=1e-3, atol=1e-3)


def test_a_converted_tokenizer_reads_chinese(converted: Path) -> None:
    known = load_vocabulary(locate(str(converted)))
    assert (known.eos_token, known.eos_id) == ("</s>", 1)


def test_a_gguf_file_is_converted_once(converted: Path) -> None:
    target = locate(str(converted))
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert locate(str(converted)) == target
    assert (target / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_conversion_is_made_anew(converted: Path) -> None:
    weights = locate(str(converted)) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"harm")
    assert locate(str(converted)) == weights.parent
    assert weights.read_bytes() == good


# -- hub ----


def by_itself(endpoint: str, home: Path, model: str, **env: str) -> dict[str, str]:
    """`locate` in a process of its own, which reads the hub's variables anew."""
    code = (
        "import json, sys\n"
        "from vicuna.errors import UserError\n"
        "from vicuna.model.base import locate\n"
        "try: print(json.dumps({'folder': str(locate(sys.argv[1]))}))\n"
        "except UserError as e: print(json.dumps({'error': str(e)}))\n"
    )
    hub = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "*",
    }
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env={**kept, **hub, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    """A stand-in for the hub on this machine that has one model, `owner/tiny`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = sorted(p for p in folder.iterdir() if p.is_file())
            about = {
                "id": "owner/tiny",
                "sha": COMMIT,
                "siblings": [{"rfilename": p.name, "size": p.stat().st_size} for p in files],
            }
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"{i:040x}"}
                for i, p in enumerate(files)
            ]
            if path.startswith("/api/models/owner/tiny/tree"):
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/owner/tiny"):
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif path.startswith("/owner/tiny/resolve/"):
                file = folder / path.rsplit("/", 1)[-1]
                body = file.read_bytes()
                self.answer(200, body, ETag=f'"{len(body):040x}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_comes_from_the_hub_and_then_from_its_cache(
    hub: str, folder: Path, tmp_path: Path
) -> None:
    fetched = Path(by_itself(hub, tmp_path, "owner/tiny")["folder"])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    offline = by_itself("http://127.0.0.1:9", tmp_path, "owner/tiny", HF_HUB_OFFLINE="1")
    assert Path(offline["folder"]) == fetched


def test_a_model_the_hub_does_not_have_is_refused(hub: str, tmp_path: Path) -> None:
    assert "Check the name" in by_itself(hub, tmp_path, "owner/none")["error"]


def test_without_a_network_the_error_names_the_ways_out(tmp_path: Path) -> None:
    error = by_itself("http://127.0.0.1:9", tmp_path, "owner/tiny")["error"]
    assert "HF_ENDPOINT" in error
    offline = by_itself("http://127.0.0.1:9", tmp_path, "owner/tiny", HF_HUB_OFFLINE="1")
    assert "not in its cache" in offline["error"]
