"""The form of a new training: settings, what is wrong with them, their memory, the start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from vicuna import config
from vicuna.errors import SettingsError, UserError
from vicuna.runs.manager import Run, Runs
from vicuna.web import files, train_form, train_html
from vicuna.web.events import QUIET, Updates, bind
from vicuna.web.i18n import catalog, help_text, label, translate
from vicuna.web.render import note, render
from vicuna.web.state import App
from vicuna.web.train_form import MAIN, Field
from vicuna.web.train_plan import longest_example, plan

if TYPE_CHECKING:
    from vicuna.web.train_watch import Watch


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
                [(label("train.recipe_none"), ""), *((r, r) for r in train_form.recipes())],
                value="",
                label=label("train.recipe"),
                info=label("train.recipe_help"),
                min_width=220,
                elem_id="train-recipe",
            )
            self.name = gr.Textbox(
                label=label("train.name"),
                info=label("train.name_help"),
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
        with gr.Accordion(label("train.more"), open=False, elem_id="train-more"):
            for group, members in groups.items():
                gr.HTML(render("page.group", title=label(f"group.{group}")), elem_classes="v-group")
                with gr.Row(elem_classes="v-form"):
                    for field in members:
                        self._input(field)
        with gr.Row():
            self.check = gr.Button(label("train.plan"), min_width=160, elem_id="train-plan")
            self.start = gr.Button(
                label("train.start"), variant="primary", min_width=160, elem_id="train-start"
            )
        self.answer = gr.HTML(elem_id="train-answer")
        with gr.Row(visible=False) as self.misfit:
            self.other = gr.Radio([], label=label("train.alternatives"), type="index", scale=3)
            with gr.Column(scale=1, min_width=180):
                self.take = gr.Button(label("train.take"))
                self.anyway = gr.Button(label("train.start_anyway"), variant="stop")

    def _input(self, field: Field) -> None:
        key = f"settings.{field.name}"
        about: dict[str, Any] = {
            "label": field.name,
            # A setting that is newer than its translation is explained in English.
            "info": label(key) if key in catalog() else help_text(field.name),
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
        form = list(self.inputs.values())
        answered = [self.answer, self.misfit, self.other, self.planned]
        self.recipe.input(self.fill, [self.recipe, self.inputs["dataset"]], form, **QUIET)
        self.check.click(self.check_settings, form, answered, trigger_mode="once", **QUIET)
        self.take.click(self.use, [self.planned, self.other], [*form, *answered], **QUIET)
        data = [self.inputs[name] for name in ("dataset", "val_dataset")]
        self.app.opening.append((self.list_files, None, data))

    def list_files(self) -> list[Any]:
        """The data sets there are now."""
        return [gr.update(choices=files.listed(self.app))] * 2

    def then(self, tabs: gr.Tabs, watch: Watch) -> None:
        """What the start button does, and that the run is shown then."""
        form = list(self.inputs.values())
        outputs = [
            self.answer,
            self.misfit,
            self.other,
            self.planned,
            tabs,
            watch.run,
            watch.last_sent,
        ]
        for button, anyway in ((self.start, False), (self.anyway, True)):
            button.click(
                bind(self.begin, tabs, watch, anyway),
                [self.name, self.planned, *form],
                outputs,
                trigger_mode="once",
                **QUIET
            ).then(
                watch.refresh, watch.inputs, watch.shown, **QUIET
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
            **QUIET,
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

    def check_settings(self, request: gr.Request, *form: Any) -> Iterator[Updates]:
        """What is wrong, or else the plan."""
        tr = partial(translate, request)
        try:
            self.app.may_write()
            chosen = self._chosen(form)
            settings = train_form.check(self.app, chosen)
            yield self._answer(note("busy", tr("train.planning")))
            yield self._planned(chosen, plan(chosen, longest_example(settings)), request)
        except SettingsError as e:
            yield self._answer(train_html.mistakes(e, tr))
        except UserError as e:
            yield self._answer(train_html.mistakes(e, tr, "train.no_plan"))

    def _answer(self, html: str) -> Updates:
        return {self.answer: html, self.misfit: gr.update(visible=False), self.planned: None}

    def _planned(
        self, chosen: dict[str, Any], found: dict[str, Any], request: gr.Request
    ) -> Updates:
        batch = int(chosen.get("batch_size", self.fields["batch_size"].default))
        others = [train_html.alternative(o) for o in found["alternatives"]]
        return {
            self.answer: train_html.plan(found, batch, partial(translate, request)),
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

    def begin(
        self, tabs: gr.Tabs, watch: Watch, anyway: bool,
        request: gr.Request, name: str, planned: list[Any] | None, *form: Any,
    ) -> Iterator[Updates]:  # fmt: skip
        """A start button. anyway: start even if the plan says that it does not fit."""
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
                watch.last_sent: None,
            }

    def _begin(
        self,
        request: gr.Request,
        name: str,
        planned: list[Any] | None,
        chosen: dict[str, Any],
        anyway: bool,
    ) -> Iterator[Updates | Run]:
        """Check, plan, start: what is to be answered meanwhile, and the run if there is one."""
        tr = partial(translate, request)
        try:
            self.app.may_write()
            settings = train_form.check(self.app, chosen)
            self.runs.refuse_second()
            found = planned[1] if planned and planned[0] == _key(chosen) else None
            if found is None:
                yield self._answer(note("busy", tr("train.planning")))
                found = plan(chosen, longest_example(settings))
            yield self._planned(chosen, found, request)
            if found["fits"] or anyway:
                yield self.runs.start(chosen, name)
        except SettingsError as e:
            yield self._answer(train_html.mistakes(e, tr))
        except UserError as e:
            yield self._answer(train_html.mistakes(e, tr, "train.not_started"))


def of_page(name: str) -> Any:
    """A component of another tab, by its id; that tab was built before."""
    page = gr.context.Context.root_block
    assert page is not None
    return next(block for block in page.blocks.values() if block.elem_id == name)


def _key(chosen: dict[str, Any]) -> str:
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)
