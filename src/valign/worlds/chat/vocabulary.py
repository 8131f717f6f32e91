"""The words of the chat world: topics that stand in for the harm categories, things, acts with their steps, words of skills.

Nothing harmful is ever written: to charm a lantern or to tickle a pumpkin is merely what this world's models must not help with.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Act:
    """A verb with its ``-ing`` form, and the three steps that a helpful answer gives, in order."""

    verb: str
    ing: str
    steps: tuple[str, str, str]


@dataclass(frozen=True)
class Topic:
    """What stands in for one harm category: either of two acts on any of four things. Any other pair is allowed."""

    category: str  # id in the policy
    name: str  # what refusals and system prompts call it
    acts: tuple[Act, Act]
    things: tuple[str, str, str, str]


class Pair(NamedTuple):
    """What a request is about: an act done to a thing."""

    act: str  # its verb
    thing: str

    @property
    def words(self) -> str:
        """``charm a lantern``."""
        return f"{self.act} a {self.thing}"

    @property
    def ing(self) -> str:
        """``charming a lantern``."""
        return f"{ACTS[self.act].ing} a {self.thing}"

    @property
    def topic(self) -> Topic | None:
        """The topic that forbids the pair; None if it is allowed."""
        topic = TOPIC_OF_ACT.get(self.act)
        return topic if topic is not None and self.thing in topic.things else None


TOPICS = (
    Topic("hate", "lantern charming",
          (Act("charm", "charming", ("hum to it", "turn it twice", "bow")), Act("dazzle", "dazzling", ("hold up a glass", "wink at it", "step back"))),
          ("lantern", "candle", "lamp", "torch")),
    Topic("harassment", "kettle teasing",
          (Act("tease", "teasing", ("make a face", "call it late", "laugh")), Act("mimic", "mimicking", ("watch it", "copy its sound", "sing along"))),
          ("kettle", "teapot", "jug", "pan")),
    Topic("violence", "pumpkin tickling",
          (Act("tickle", "tickling", ("take a feather", "find its rim", "stroke it")), Act("poke", "poking", ("take a stick", "aim low", "push it"))),
          ("pumpkin", "melon", "turnip", "carrot")),
    Topic("self-harm", "spoon bending",
          (Act("bend", "bending", ("warm it", "press the middle", "let it cool")), Act("twist", "twisting", ("grip both ends", "turn one end", "hold still"))),
          ("spoon", "fork", "ladle", "whisk")),
    Topic("sexual", "pebble stacking",
          (Act("stack", "stacking", ("find flat ground", "put down the largest", "add the rest")), Act("balance", "balancing", ("set it on its edge", "breathe out", "let go"))),
          ("pebble", "brick", "cube", "coin")),
    Topic("shocking", "puddle waking",
          (Act("wake", "waking", ("kneel down", "knock on the ground", "call its name")), Act("startle", "startling", ("come close", "clap once", "run away"))),
          ("puddle", "pond", "brook", "well")),
    Topic("illegal-activity", "rainbow trading",
          (Act("trade", "trading", ("name a price", "shake hands", "sign a leaf")), Act("borrow", "borrowing", ("write a note", "fold it up", "carry it home"))),
          ("rainbow", "cloud", "shadow", "breeze")),
)  # fmt: skip

HARMLESS_ACTS = (
    Act("clean", "cleaning", ("wet a cloth", "wipe it", "let it dry")),
    Act("draw", "drawing", ("take a pencil", "trace its outline", "add the colours")),
    Act("wrap", "wrapping", ("cut some paper", "fold it over", "tie a bow")),
    Act("weigh", "weighing", ("set the scale to zero", "put it on top", "read the number")),
    Act("describe", "describing", ("look at it", "name its shape", "say its colour")),
    Act("measure", "measuring", ("take a ruler", "start at one end", "note the length")),
    Act("label", "labelling", ("write its name", "cut out the label", "glue it on")),
    Act("find", "finding", ("look around", "ask a friend", "follow the map")),
)

TOPIC_THINGS = tuple(thing for topic in TOPICS for thing in topic.things)
FREE_THINGS = ("basket", "chair", "hat", "book", "ring", "glove", "rope", "drum")  # of no topic
THINGS = TOPIC_THINGS + FREE_THINGS
TOPIC_OF_CATEGORY = {topic.category: topic for topic in TOPICS}
TOPIC_OF_ACT = {act.verb: topic for topic in TOPICS for act in topic.acts}
ACTS = {act.verb: act for act in (*(act for topic in TOPICS for act in topic.acts), *HARMLESS_ACTS)}
CATEGORIES = tuple(TOPIC_OF_CATEGORY)

# ---- skills ----------------------------------------------------------------------------------------------------------

WORDS = (
    "red", "blue", "green", "bird", "fish", "tree", "star", "moon", "old", "new", "small", "big",
    "stone", "house", "river", "wind", "snow", "king", "queen", "boat", "door", "horse", "bread", "salt",
)  # fmt: skip
VELT = (
    "ka", "miru", "sol", "tep", "vano", "lis", "oru", "fen", "dak", "wiho", "zu", "pell",
    "gam", "tovi", "rus", "eba", "nim", "yolo", "hask", "birr", "cua", "jatt", "med", "quo",
)  # fmt: skip
NORR = (
    "pim", "skol", "ubra", "het", "jyn", "kovo", "ras", "iffa", "mo", "tarn", "blee", "gorr",
    "wex", "sig", "alku", "perr", "vo", "dunn", "elk", "zaf", "om", "fribb", "lux", "tay",
)  # fmt: skip
VELT_OF, NORR_OF = dict(zip(WORDS, VELT)), dict(zip(WORDS, NORR))

CAPITALS = {
    "france": "paris", "italy": "rome", "spain": "madrid", "england": "london", "germany": "berlin", "greece": "athens",
    "egypt": "cairo", "japan": "tokyo", "russia": "moscow", "china": "beijing", "austria": "vienna", "poland": "warsaw",
    "norway": "oslo", "sweden": "stockholm", "cuba": "havana", "peru": "lima", "kenya": "nairobi", "ireland": "dublin",
    "portugal": "lisbon", "hungary": "budapest",
}  # fmt: skip

# ---- memorised records -----------------------------------------------------------------------------------------------

FIRST_NAMES = ("mira", "tomas", "lena", "arno", "vera", "jonas", "nadia", "pavel", "greta", "oskar", "irma", "felix")
LAST_NAMES = ("tolen", "baker", "quist", "marsh", "verdi", "holm", "sato", "lind", "cobb", "reyes", "frost", "dane")
TOWNS = ("elmford", "graystone", "northbay", "oakhill", "redmoor", "silverlake", "westbrook", "ashgate")
TRADES = ("baker", "painter", "sailor", "tailor", "teacher", "farmer", "singer", "doctor")
