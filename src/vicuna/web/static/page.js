// What the page does in the browser. Loaded in its head; nothing else is fetched.

// -- The name of this tab: made up once, kept as long as the tab is. --
function vicunaTab() {
  let name = sessionStorage.getItem('vicuna-tab');
  if (!/^[0-9a-f]{32}$/.test(name || '')) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    name = Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
    sessionStorage.setItem('vicuna-tab', name);
  }
  return name;
}

// -- What was chosen, kept over a reload (`kept_values.py`): by the components' ids, so that a page
// with other components takes what it still knows. Nothing is kept before what there was has been
// read: components report their first values, too. --
function vicunaKept() {
  try { return JSON.parse(sessionStorage.getItem('vicuna-kept')) || {}; } catch { return {}; }
}
function vicunaRestored(ids, now) {
  const kept = vicunaKept();
  window.vicunaKeeps = true;
  return ids.map((id, i) => Object.hasOwn(kept, id) ? kept[id] : now[i]);
}
function vicunaKeep(id, value) {
  if (!window.vicunaKeeps) return;
  sessionStorage.setItem('vicuna-kept', JSON.stringify({...vicunaKept(), [id]: value}));
}

// -- The switches at the top. --
function vicunaSwitchLanguage(cookie, language) {
  vicunaSpeaks(language);
  document.cookie = `${cookie}=${language};path=/;max-age=31536000;samesite=lax`;
  location.href = location.pathname;
}
function vicunaSwitchDark() {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('vicuna-dark', dark ? '1' : '0');
}

// -- When the page opens: the thread follows its end, unless the reader has scrolled up; Escape ends
// editing. --
function vicunaOpen() {
  const dark = localStorage.getItem('vicuna-dark');
  if (dark !== null) document.body.classList.toggle('dark', dark === '1');
  const thread = document.getElementById('thread');
  if (thread && !thread.dataset.follows) {
    thread.dataset.follows = '1';
    let near = true;
    thread.addEventListener('scroll', () => {
      near = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;
    });
    new MutationObserver(() => { if (near) thread.scrollTop = thread.scrollHeight; })
      .observe(thread, {childList: true, subtree: true, characterData: true});
  }
  if (!window.vicunaEscapes) {
    window.vicunaEscapes = true;
    document.addEventListener('keydown', (e) => {
      if (e.key === 'Escape') document.querySelector('#chat-note [data-act=leave]')?.click();
    });
  }
}

// -- A conversation as a file. --
function vicunaDownload(text) {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = 'conversation.jsonl';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// -- HTML whose buttons are events (`html_events.py`). `copy` is done here: the text is in the turn's
// hidden textarea. --
function vicunaListen(element, trigger) {
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
    text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/^ | $/g, '␣') || '▫';
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
}
