"""The web page of `vicuna web`: chat, instruct, adapters, data, train.

`server.py` opens it, `page.py` lays it out. Every tab is a module `tab_NAME.py` with a function
`build(app: App) -> None`, which is called inside the page's `gr.Blocks`, in a `gr.Tab` of its own,
adds its components and says what happens on their events. What a tab knows of the rest is `App`
(`state.py`): the settings of the command, the model and its queue, the sessions, the adapters.

Texts are never written in a tab: `i18n.label("key")` stands for a text in English and Chinese from
`texts/*.yaml` (a file for each tab); see `i18n.py`. HTML is in `templates/*.html`, which escape
what is put into them (`render.py`); what happens in the browser is in `static/page.js`; colours
and sizes are in `theme.py` and `static/style.css`.
"""
