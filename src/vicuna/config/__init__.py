"""The settings of each command: one table that gives the YAML keys, the command line and the help.

`vicuna COMMAND [RECIPE.yaml] [--key value | key=value] ...`: later wins. All mistakes are reported
together, a misspelt key with the nearest right one, a name of the 2023 project with today's.

A module for each kind of command holds its settings; `parse` reads them.
"""

from vicuna.config.base import DatasetEntry, Settings
from vicuna.config.data import (
    DataCheckSettings,
    DataConvertSettings,
    DataPreviewSettings,
    DataSettings,
)
from vicuna.config.decoding import AnswerSettings, GenerateSettings, ModelSettings, RunSettings
from vicuna.config.models import (
    AdapterInspectSettings,
    AdapterUpgradeSettings,
    ConvertSettings,
    ExportSettings,
    MergeSettings,
    QuantizeSettings,
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
from vicuna.config.renamed import OLD_NAMES
from vicuna.config.train import PlanSettings, TrainSettings
from vicuna.config.utilities import DemoSettings, DoctorSettings, DownloadSettings
from vicuna.config.web import WebSettings

__all__ = [
    "OLD_NAMES",
    "RUN_KEYS",
    "AdapterInspectSettings",
    "AdapterUpgradeSettings",
    "AnswerSettings",
    "ConvertSettings",
    "DataCheckSettings",
    "DataConvertSettings",
    "DataPreviewSettings",
    "DataSettings",
    "DatasetEntry",
    "DemoSettings",
    "DoctorSettings",
    "DownloadSettings",
    "ExportSettings",
    "GenerateSettings",
    "MergeSettings",
    "ModelSettings",
    "PlanSettings",
    "QuantizeSettings",
    "RunSettings",
    "Settings",
    "TrainSettings",
    "VerifySettings",
    "WebSettings",
    "build",
    "builtin_recipes",
    "dataset_entries",
    "parse",
    "read_recipe",
]
