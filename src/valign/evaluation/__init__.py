"""What did it change, and how sure are we? Metrics, statistics, suites, and the report."""

from valign.evaluation.images.measuring import Evaluators
from valign.evaluation.report.report import ReportOptions
from valign.evaluation.runner import counted_categories, evaluate
from valign.evaluation.suite import EvalPrompt, Suite, refuse_overlap
from valign.evaluation.suite_files import read_suite, write_suite
from valign.evaluation.systems import System, adapter_system, base_system, guided_system, value_system

__all__ = [
    "EvalPrompt",
    "Evaluators",
    "ReportOptions",
    "Suite",
    "System",
    "adapter_system",
    "base_system",
    "counted_categories",
    "evaluate",
    "guided_system",
    "read_suite",
    "refuse_overlap",
    "value_system",
    "write_suite",
]
