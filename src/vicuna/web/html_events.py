"""Buttons inside of HTML that tell the server what they are for.

An element with `data-act` inside of a `clickable_html()` component triggers its click event with
that act and everything else that the element carries as `data-...` (`data-path` must not be among
it: gradio takes a path for a file); a range or a checkbox tells its value.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

# `copy` is done in the browser: the text is in the turn's hidden textarea.
_LISTEN = """
const tell = (b, more) => trigger('click', {...b.dataset, ...more});
const copy = (b) => {
  const raw = b.closest('.v-turn').querySelector('.v-raw');
  raw.select();
  if (navigator.clipboard) navigator.clipboard.writeText(raw.value);
  else document.execCommand('copy');
  raw.blur(); b.classList.add('on'); setTimeout(() => b.classList.remove('on'), 900);
};
element.addEventListener('click', (e) => {
  const b = e.target.closest('button[data-act]');
  if (!b || b.disabled) return;
  if (b.dataset.act === 'copy') copy(b); else tell(b, {});
});
element.addEventListener('change', (e) => {
  const b = e.target.closest('input[data-act]');
  if (b) tell(b, {value: b.type === 'checkbox' ? String(b.checked) : b.value});
});
// What is drawn anew takes over the elements that were there, and what somebody ticked or moved on
// them, for another thing perhaps: the markup alone says how they stand.
new MutationObserver(() => {
  for (const b of element.querySelectorAll('input[data-act]')) {
    if (b.type === 'checkbox') b.checked = b.hasAttribute('checked');
    else if (b !== document.activeElement) b.value = b.getAttribute('value');
  }
}).observe(element, {subtree: true, childList: true, attributes: true});
// The tokens of an answer (`probabilities.py`): what else could have stood in the place of one.
const percent = (p) => (100 * p).toFixed(p < 0.1 ? 2 : 1) + '%';
const visible = (text) =>
  text.replace(/\\n/g, '↵').replace(/\\t/g, '⇥').replace(/^ | $/g, '␣') || '▫';
const point = (token) => {
  const box = token.closest('.v-toks');
  box.querySelector('.at')?.classList.remove('at');
  token.classList.add('at');
  box.parentElement.querySelector('.v-alts').replaceChildren(
    ...JSON.parse(token.dataset.top).map(([text, p], i) => {
      const row = document.createElement('div');
      if (!i) row.className = 'own';
      for (const [name, words] of [['b', visible(text)], ['i', ''], ['span', percent(p)]])
        row.appendChild(document.createElement(name)).textContent = words;
      row.children[1].style.width = 6 * p + 'rem';
      return row;
    }));
};
for (const kind of ['mouseover', 'click']) element.addEventListener(kind, (e) => {
  const token = e.target.closest('.v-tok');
  if (token) point(token);
});
element.addEventListener('keydown', (e) => {
  const box = e.target.closest('.v-toks'), step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
  if (!box || !step) return;
  const all = [...box.children], at = all.findIndex((t) => t.classList.contains('at'));
  const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + step))];
  if (next) { point(next); next.scrollIntoView({block: 'nearest'}); e.preventDefault(); }
});
element.addEventListener('input', (e) => {
  const out = e.target.closest('label')?.querySelector('output');
  if (out) out.textContent = Number(e.target.value).toFixed(2);
});
"""


def clickable_html(value: str = "", **options: Any) -> gr.HTML:
    """An HTML component whose buttons act; `event_payload` reads what they carry."""
    return gr.HTML(value, js_on_load=_LISTEN, **options)


def event_payload(event: gr.EventData) -> dict[str, str]:
    """What the button carried: `act`, and the rest of its data. Nothing of it is to be trusted."""
    found = event._data if isinstance(event._data, dict) else {}
    return {str(k): str(v) for k, v in found.items()}


def address_of(request: gr.Request) -> str:
    """Where a request came from; "" where that is not known."""
    return str(getattr(getattr(request, "client", None), "host", "") or "")


def number(found: dict[str, str], key: str = "i") -> int:
    """A whole number that a button carried; -1 where it is none."""
    text = found.get(key, "")
    return int(text) if text.isdigit() and len(text) < 10 else -1
