"""The form of a new training: settings, what is wrong with them, their memory, the start."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from vicuna import config
from vicuna.errors import SettingsError, UserError
from vicuna.runs.manager import Run, Runs
from vicuna.web import files, train_form, train_html
from vicuna.web.data_html import note
from vicuna.web.i18n import say, t, texts
from vicuna.web.state import App
from vicuna.web.train_form import MAIN, Field
from vicuna.web.train_plan import longest_example, plan

if TYPE_CHECKING:
    from vicuna.web.train_watch import Watch

Updates = dict[Any, Any]


class NewTraining:
    """The components of the form, and what they do.

    planned: (settings as JSON, their plan): a start right after a plan does not plan again.
    """

    def __init__(self, app: App, runs: Runs) -> None:
        self.app, self.runs = app, runs
        self.fields = train_form.fields()
        self.inputs: dict[str, Any] = {}
        self.planned = gr.State(None)
        self._layout()
        self._events()

    # What is there.

    def _layout(self) -> None:
        with gr.Row():
            self.recipe = gr.Dropdown(
                [(t("train.recipe_none"), ""), *((r, r) for r in train_form.recipes())],
                value="",
                label=t("train.recipe"),
                info=t("train.recipe_help"),
                min_width=220,
                elem_id="train-recipe",
            )
            self.name = gr.Textbox(
                label=t("train.name"),
                info=t("train.name_help"),
                max_lines=1,
                min_width=220,
                elem_id="train-name",
            )
        with gr.Row(elem_classes="v-form"):
            for name in MAIN:
                self._input(self.fields[name])
        groups: dict[str, list[Field]] = {}
        for field in self.fields.values():
            if field.name not in MAIN:
                groups.setdefault(field.group, []).append(field)
        with gr.Accordion(t("train.more"), open=False, elem_id="train-more"):
            for group, members in groups.items():
                gr.HTML(f"<h4>{t(f'group.{group}')}</h4>", elem_classes="v-group")
                with gr.Row(elem_classes="v-form"):
                    for field in members:
                        self._input(field)
        with gr.Row():
            self.check = gr.Button(t("train.plan"), min_width=160, elem_id="train-plan")
            self.start = gr.Button(
                t("train.start"), variant="primary", min_width=160, elem_id="train-start"
            )
        self.answer = gr.HTML(elem_id="train-answer")
        with gr.Row(visible=False) as self.misfit:
            self.other = gr.Radio([], label=t("train.alternatives"), type="index", scale=3)
            with gr.Column(scale=1, min_width=180):
                self.take = gr.Button(t("train.take"))
                self.anyway = gr.Button(t("train.start_anyway"), variant="stop")

    def _input(self, field: Field) -> None:
        key = f"settings.{field.name}"
        about: dict[str, Any] = {
            "label": field.name,
            # A setting that is newer than its translation is explained in English.
            "info": t(key) if key in texts() else _english(field.name),
            "min_width": 220,
            "elem_id": f"set-{field.name}",
        }
        value = field.shown(field.default)
        made: Any
        if field.name == "model":
            offered = files.models(self.app)
            made = gr.Dropdown(offered, value=offered[0], allow_custom_value=True, **about)
        elif field.name == "template":
            made = gr.Dropdown(files.templates(), value=value, allow_custom_value=True, **about)
        elif field.kind == "paths":
            made = gr.Dropdown(
                files.listed(self.app),
                value=value,
                multiselect=True,
                allow_custom_value=True,
                **about,
            )
        elif field.kind == "choice":
            made = gr.Dropdown(list(field.choices), value=value, **about)
        elif field.kind == "switch":
            made = gr.Checkbox(value, **about)
        elif field.kind in ("number", "whole"):
            made = gr.Number(value, **about)
        else:
            lines = 2 if field.kind == "lines" else 1
            made = gr.Textbox(value, lines=lines, max_lines=6 if lines > 1 else 1, **about)
        self.inputs[field.name] = made

    def _events(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        form = list(self.inputs.values())
        said = [self.answer, self.misfit, self.other, self.planned]
        self.recipe.input(self.fill, [self.recipe, self.inputs["dataset"]], form, **quiet)
        self.check.click(self.look, form, said, trigger_mode="once", **quiet)
        self.take.click(self.use, [self.planned, self.other], [*form, *said], **quiet)
        data = [self.inputs[name] for name in ("dataset", "val_dataset")]
        self.app.opening.append((self.list_files, None, data))

    def list_files(self) -> list[Any]:
        """The data sets there are now."""
        return [gr.update(choices=files.listed(self.app))] * 2

    def then(self, tabs: gr.Tabs, watch: Watch) -> None:
        """What the start button does, and that the run is shown then."""
        form = list(self.inputs.values())
        outputs = [self.answer, self.misfit, self.other, self.planned, tabs, watch.run, watch.seen]
        for button, anyway in ((self.start, False), (self.anyway, True)):
            button.click(
                self._beginning(tabs, watch, anyway),
                [self.name, self.planned, *form],
                outputs,
                trigger_mode="once",
                show_progress="hidden",
                api_visibility="private",
            ).then(
                watch.refresh, watch.asked, watch.shown, show_progress="hidden",
                api_visibility="private",
            )  # fmt: skip

    def from_data(self, tabs: gr.Tabs) -> None:
        """The button of the tab Data that brings its data set and cutoff here."""

        def bring(source: str, cutoff: float) -> list[Any]:
            there = gr.update(selected="train"), gr.update(selected="new")
            return [*there, [source] if source else [], int(cutoff)]

        of_page("data-train").click(
            bring,
            [of_page("data-source"), of_page("data-cutoff")],
            [of_page("tabs"), tabs, self.inputs["dataset"], self.inputs["cutoff_len"]],
            show_progress="hidden",
            api_visibility="private",
        )

    # What happens.

    def fill(self, recipe: str, dataset: list[str]) -> list[Any]:
        """A recipe was chosen: its values, and for the rest the defaults."""
        found: dict[str, Any] = {"model": files.models(self.app)[0]}
        if recipe:
            found |= config.read_recipe(config.builtin_recipes()[recipe])
        return self.values({**found, "dataset": dataset or found.get("dataset", [])})

    def values(self, recipe: Mapping[str, Any]) -> list[Any]:
        """A recipe as values of the form's components, in their order."""
        shown = train_form.shown(recipe)
        return [shown[name] for name in self.inputs]

    def _chosen(self, form: tuple[Any, ...]) -> dict[str, Any]:
        return train_form.given(dict(zip(self.inputs, form)))

    def look(self, request: gr.Request, *form: Any) -> Iterator[Updates]:
        """What is wrong, or else the plan."""
        words = partial(say, request)
        try:
            self.app.may_write()
            chosen = self._chosen(form)
            settings = train_form.check(self.app, chosen)
            yield self._said(note("busy", words("train.planning")))
            yield self._planned(chosen, plan(chosen, longest_example(settings)), request)
        except SettingsError as e:
            yield self._said(train_html.mistakes(e, words))
        except UserError as e:
            yield self._said(train_html.mistakes(e, words, "train.no_plan"))

    def _said(self, html: str) -> Updates:
        return {self.answer: html, self.misfit: gr.update(visible=False), self.planned: None}

    def _planned(
        self, chosen: dict[str, Any], found: dict[str, Any], request: gr.Request
    ) -> Updates:
        batch = int(chosen.get("batch_size", self.fields["batch_size"].default))
        others = [train_html.alternative(o) for o in found["alternatives"]]
        return {
            self.answer: train_html.plan(found, batch, partial(say, request)),
            self.misfit: gr.update(visible=not found["fits"]),
            self.other: gr.update(
                choices=others, value=others[0] if others else None, visible=bool(others)
            ),
            self.planned: [_key(chosen), found, chosen],
        }

    def use(self, planned: list[Any] | None, other: int | None) -> list[Any]:
        """Settings that would fit were taken: they go into the form."""
        same = [gr.skip()] * (len(self.inputs) + 4)
        if planned is None or other is None:
            return same
        settings = planned[1]["alternatives"][other]["settings"]
        form = self.values({**planned[2], **settings})
        return [*form, "", gr.update(visible=False), gr.skip(), None]

    def _beginning(
        self, tabs: gr.Tabs, watch: Watch, anyway: bool
    ) -> Callable[..., Iterator[Updates]]:
        """What a start button does. anyway: also where the plan says that it does not fit."""

        # A function of its own: gradio sees no annotations, so no request, behind a `partial`.
        def begin(
            request: gr.Request, name: str, planned: list[Any] | None, *form: Any
        ) -> Iterator[Updates]:
            run = None
            for step in self._begin(request, name, planned, self._chosen(form), anyway):
                if isinstance(step, Run):
                    run = step
                else:
                    yield step
            if run is not None:
                yield {
                    self.misfit: gr.update(visible=False),
                    tabs: gr.update(selected="runs"),
                    watch.run: gr.update(choices=watch.names(request), value=run.name),
                    watch.seen: None,
                }

        return begin

    def _begin(
        self,
        request: gr.Request,
        name: str,
        planned: list[Any] | None,
        chosen: dict[str, Any],
        anyway: bool,
    ) -> Iterator[Updates | Run]:
        """Check, plan, start: what is to be said meanwhile, and the run if there is one."""
        words = partial(say, request)
        try:
            self.app.may_write()
            settings = train_form.check(self.app, chosen)
            self.runs.refuse_second()
            found = planned[1] if planned and planned[0] == _key(chosen) else None
            if found is None:
                yield self._said(note("busy", words("train.planning")))
                found = plan(chosen, longest_example(settings))
            yield self._planned(chosen, found, request)
            if found["fits"] or anyway:
                yield self.runs.start(chosen, name)
        except SettingsError as e:
            yield self._said(train_html.mistakes(e, words))
        except UserError as e:
            yield self._said(train_html.mistakes(e, words, "train.not_started"))


def of_page(name: str) -> Any:
    """A component of another tab, by its id; that tab was built before."""
    page = gr.context.Context.root_block
    assert page is not None
    return next(block for block in page.blocks.values() if block.elem_id == name)


def _english(name: str) -> str:
    return config.TrainSettings.model_fields[name].description or ""


def _key(chosen: dict[str, Any]) -> str:
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)
