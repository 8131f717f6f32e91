"""Give a drifted model its safety back by arithmetic on weights: one file per method, streamed weight by weight."""

from collections.abc import Mapping

from valign.merging.realign.base import RealignContext, RealignMethod
from valign.merging.realign.chat_preferences import ChatPreferences
from valign.merging.realign.enchtable import EnchTable, enchtable, interference
from valign.merging.realign.image_preferences import ImagePreferences
from valign.merging.realign.linearize import linearized
from valign.merging.realign.opening import Realignment, open_realignment
from valign.merging.realign.preferences import PreferenceRows, load_preferences, read_preferences, rows_fingerprint
from valign.merging.realign.resta import Resta, resta
from valign.merging.realign.safe_lora import SafeLora, safe_lora
from valign.merging.realign.somf import SafetyPreferences, Somf, somf
from valign.merging.realign.vectors import AdapterChanges, FolderChanges, Vectors, WeightVectors
from valign.merging.realign.writing import realign
from valign.plugins import with_plugins

# name -> the realignment as a dataclass of options; entry points of the group ``valign.realignments`` add rows
REALIGN: Mapping[str, type[RealignMethod]] = with_plugins(
    "valign.realignments", {"somf": Somf, "enchtable": EnchTable, "safe-lora": SafeLora, "resta": Resta}
)

__all__ = [
    "REALIGN",
    "AdapterChanges",
    "ChatPreferences",
    "EnchTable",
    "FolderChanges",
    "ImagePreferences",
    "PreferenceRows",
    "RealignContext",
    "RealignMethod",
    "Realignment",
    "Resta",
    "SafeLora",
    "SafetyPreferences",
    "Somf",
    "Vectors",
    "WeightVectors",
    "enchtable",
    "interference",
    "linearized",
    "load_preferences",
    "open_realignment",
    "read_preferences",
    "realign",
    "resta",
    "rows_fingerprint",
    "safe_lora",
    "somf",
]
