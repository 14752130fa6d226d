"""What runs in gptqmodel's own environment: quantise a folder, give its scores, let it answer.

    python worker.py quantize JOB.json
    python worker.py scores JOB.json > scores
    python worker.py answer JOB.json > ids

It imports nothing of vicuna's, which is not installed there. What it has to say goes to standard
error, a JSON object a line behind a mark; everything else there is the library's own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

MARK = "@vicuna "


def main() -> int:
    """Do one job; a failure is told in the library's words."""
    task, path = sys.argv[1:3]
    with open(path, encoding="utf-8") as f:
        job = json.load(f)
    # The library prints on standard output, too; what is handed on there is for scores alone.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        if task == "quantize":
            _quantize(job)
        elif task == "scores":
            _scores(job, out)
        else:
            _answer(job, out)
        out.close()
    except MemoryError:
        _say(error="memory ran out")
        return 1
    except Exception as e:
        traceback.print_exc()
        _say(error=f"{type(e).__name__}: {e}")
        return 1
    return 0


def _say(**words: Any) -> None:
    print(f"\n{MARK}{json.dumps(words)}", file=sys.stderr, flush=True)


def _quantize(job: dict[str, Any]) -> None:
    import torch
    from gptqmodel import GPTQModel

    texts = [torch.tensor([ids], dtype=torch.long) for ids in job["texts"]]
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTQModel.load(job["model"], _config(job), device=device)
    _say(layers=model.model.config.get_text_config().num_hidden_layers)
    model.layer_callback = _Watch()
    model.quantize(examples, batch_size=1, calibration_data_min_length=1, **_kernel(job, device))
    model.save(job["output"])


def _kernel(job: dict[str, Any], device: str) -> dict[str, Any]:
    """What packs AWQ's weights without a GPU; else the library's own choice."""
    from gptqmodel import BACKEND

    return {"backend": BACKEND.AWQ_TORCH} if job["method"] == "awq" and device == "cpu" else {}


def _config(job: dict[str, Any]) -> Any:
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    common = {
        "bits": job["bits"],
        "group_size": job["group_size"],
        "offload_to_disk": False,
    }
    if job["method"] == "awq":
        return AWQConfig(**common)
    extra = {} if job["damp"] is None else {"damp_percent": job["damp"]}
    return GPTQConfig(
        **common, desc_act=job["act_order"], act_group_aware=not job["act_order"], **extra
    )


class _Watch:
    """What the library tells when a layer is done; it may do so twice a layer."""

    def __init__(self) -> None:
        self._done: set[int] = set()

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:  # noqa: ARG002
        if layer_idx not in self._done:
            self._done.add(layer_idx)
            _say(done=len(self._done))


def _scores(job: dict[str, Any], out: Any) -> None:
    """Rows and columns as two int64, then the scores in float32, of each text in turn."""
    import numpy as np
    import torch

    model = _open(job)
    for ids in job["texts"]:
        with torch.inference_mode():
            given = torch.tensor([ids], device=model.device)
            scores = model(input_ids=given, use_cache=False).logits[0].float().cpu().numpy()
        out.write(np.array(scores.shape, np.int64).tobytes())
        out.write(np.ascontiguousarray(scores, np.float32).tobytes())
        out.flush()


def _answer(job: dict[str, Any], out: Any) -> None:
    """The ids of the likeliest answer as int64, the token that ended it among them."""
    import numpy as np
    import torch

    model = _open(job)
    given = torch.tensor([job["prompt"]], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
            max_new_tokens=job["longest"], eos_token_id=job["ends"], pad_token_id=job["ends"][0],
        )  # fmt: skip
    out.write(found[0, given.shape[1] :].cpu().numpy().astype(np.int64).tobytes())


def _open(job: dict[str, Any]) -> Any:
    """The quantised model, ready to compute."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = BACKEND.AWQ_TORCH if job["method"] == "awq" else BACKEND.GPTQ_TORCH
    backend = BACKEND.AUTO if device == "cuda" else plain
    return GPTQModel.load(job["model"], device=device, backend=backend).model.eval()


if __name__ == "__main__":
    sys.exit(main())
