// Gradio's own few words follow `navigator.language`: it is made the page's language. Each request of
// the page states its language, because the cookie may be another tab's by then; and a tab that is
// loaded again asks for the language that it had. NAME, CODE and HEADER are filled in by `i18n.py`.
for (const [k, v] of [['language', NAME], ['languages', [NAME]]])
  Object.defineProperty(navigator, k, {get: () => v});
const vicunaSpeaks = (language) => sessionStorage.setItem('vicuna-language', language);
(() => {
  const spoken = sessionStorage.getItem('vicuna-language'), here = new URL(location.href);
  if (!spoken) vicunaSpeaks('CODE');
  else if (spoken !== 'CODE' && here.searchParams.get('language') !== spoken) {
    here.searchParams.set('language', spoken);
    location.replace(here.href);
  }
  const ask = window.fetch;
  window.fetch = (to, how = {}) => {
    const own = new URL(to.url || to, location.href).origin === location.origin;
    if (!own) return ask(to, how);
    const headers = new Headers(how.headers || (to instanceof Request ? to.headers : {}));
    headers.set('HEADER', 'CODE');
    return ask(to, {...how, headers});
  };
})();
