"""The settings of each command: one table that gives the YAML keys, the command line and the help.

`vicuna COMMAND [RECIPE.yaml] [--key value | key=value] ...`: later wins. All mistakes are reported
together, a misspelt key with the nearest right one, a name of the 2023 project with today's.

A module for each kind of command holds its settings; `parse` reads them.
"""

from vicuna.config.base import DatasetEntry, Settings
from vicuna.config.data import (
    ConvertSettings,
    DataCommandSettings,
    DataSettings,
    PreviewSettings,
)
from vicuna.config.decoding import AnswerSettings, GenerateSettings, ModelSettings
from vicuna.config.models import (
    ConvertModelSettings,
    InspectSettings,
    MergeSettings,
    UpgradeSettings,
    VerifySettings,
)
from vicuna.config.parse import (
    RUN_KEYS,
    build,
    builtin_recipes,
    dataset_entries,
    parse,
    read_recipe,
)
from vicuna.config.quantize import (
    DownloadSettings,
    ExportSettings,
    QuantizeSettings,
    RunSettings,
)
from vicuna.config.renamed import OLD_NAMES
from vicuna.config.tools import DemoSettings, DoctorSettings
from vicuna.config.train import PlanSettings, TrainSettings
from vicuna.config.web import WebSettings

__all__ = [
    "OLD_NAMES",
    "RUN_KEYS",
    "AnswerSettings",
    "ConvertModelSettings",
    "ConvertSettings",
    "DataCommandSettings",
    "DataSettings",
    "DatasetEntry",
    "DemoSettings",
    "DoctorSettings",
    "DownloadSettings",
    "ExportSettings",
    "GenerateSettings",
    "InspectSettings",
    "MergeSettings",
    "ModelSettings",
    "PlanSettings",
    "PreviewSettings",
    "QuantizeSettings",
    "RunSettings",
    "Settings",
    "TrainSettings",
    "UpgradeSettings",
    "VerifySettings",
    "WebSettings",
    "build",
    "builtin_recipes",
    "dataset_entries",
    "parse",
    "read_recipe",
]
