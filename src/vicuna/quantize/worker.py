"""What runs in gptqmodel's own environment: quantise a folder, or give the scores of one.

    python worker.py quantize JOB.json
    python worker.py scores JOB.json > scores

It imports nothing of vicuna's, which is not installed there. What it has to say goes to standard
error, a JSON object a line behind a mark; everything else there is the library's own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
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
        else:
            _scores(job, out)
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
    watch = _Watch(model, job["method"])
    try:
        model.quantize(examples, batch_size=1, calibration_data_min_length=1, **_kernel(job, device))
    finally:
        watch.stop()
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
    """Tells how many layers are done: those whose linear layers were replaced or logged."""

    def __init__(self, model: Any, method: str) -> None:
        self._model, self._method, self._over = model, method, threading.Event()
        self._told = -1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            self._tell()

    def _tell(self) -> None:
        log = getattr(self._model, "quant_log", None) or []
        done = len({entry.get("layer") for entry in list(log)})
        if done != self._told:
            self._told = done
            _say(done=done)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _scores(job: dict[str, Any], out: Any) -> None:
    """Rows and columns as two int64, then the scores in float32, of each text in turn."""
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = BACKEND.AUTO if device == "cuda" else BACKEND.TORCH
    if job.get("method") == "awq" and device == "cpu":
        backend = getattr(BACKEND, "TORCH_AWQ", BACKEND.AUTO)
    model = GPTQModel.load(job["model"], device=device, backend=backend).model.eval()
    for ids in job["texts"]:
        with torch.inference_mode():
            given = torch.tensor([ids], device=device)
            scores = model(input_ids=given, use_cache=False).logits[0].float().cpu().numpy()
        out.write(np.array(scores.shape, np.int64).tobytes())
        out.write(np.ascontiguousarray(scores, np.float32).tobytes())
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
