"""How the page looks: colours and fonts of gradio's theme. All else is in `static/style.css`.

Fonts are those of the system, so that nothing is fetched from anywhere.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

STYLE = Path(__file__).parent / "static/style.css"
_FONTS = (
    "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei",
    "Noto Sans CJK SC", "Noto Sans SC", "sans-serif",
)  # fmt: skip
_MONO = (
    "ui-monospace",
    "SFMono-Regular",
    "Menlo",
    "Consolas",
    "Noto Sans Mono CJK SC",
    "monospace",
)


def theme() -> gr.themes.Base:
    """Calm and dense: white or near-black, thin lines, one accent."""
    return gr.themes.Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.stone,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_md,
        font=_FONTS,
        font_mono=_MONO,
    )
