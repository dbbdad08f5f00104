"""The configuration of every job, as frozen dataclasses. Their fields are the keys of the YAML files in `conf/`.

Owns names, defaults and the checks that need nothing but the values themselves; a field's docstring is its documentation
everywhere. Imports only the standard library.
"""

from sere.conf.schema.calibrate import CalibrateConfig, JudgeConfig
from sere.conf.schema.data import DataFormat
from sere.conf.schema.engine import EngineConfig
from sere.conf.schema.generate import GenerateConfig
from sere.conf.schema.named import PolicyName
from sere.conf.schema.reroute import RerouteConfig
from sere.conf.schema.rules import METRICS, Metric, Rules
from sere.conf.schema.sampling import SamplingConfig, StructuredOutputConfig
from sere.conf.schema.sweep import SweepConfig
from sere.conf.schema.tracking import TrackingConfig

__all__ = [
    "METRICS",
    "CalibrateConfig",
    "DataFormat",
    "EngineConfig",
    "GenerateConfig",
    "JudgeConfig",
    "Metric",
    "PolicyName",
    "RerouteConfig",
    "Rules",
    "SamplingConfig",
    "StructuredOutputConfig",
    "SweepConfig",
    "TrackingConfig",
]
