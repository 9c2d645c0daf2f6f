"""Word material of the generators: plain lists, and endless made-up words and names from syllables."""

from collections.abc import Iterator
from random import Random
from uuid import UUID

_ADJECTIVES = (
    "amber ancient bitter bold brave brisk calm careful clever cold crimson curious daring dusty eager early faint "
    "fancy fierce gentle giant golden grand happy hidden hollow honest humble icy jolly keen kind late lively lonely "
    "loud lucky mellow merry mighty misty modest narrow noble odd pale patient plain polite proud quick quiet rapid "
    "rough royal rusty salty sharp shy silent silver simple sleepy slow smooth solid stern still sturdy subtle sunny "
    "swift tall tame tender tidy tiny vivid warm wild wise young"
)

_NOUNS = (
    "acorn anchor apron arrow badger barrel basket beacon bell bench bottle bridge bucket button cabin candle canoe "
    "carpet castle cellar chimney cliff clock cloud compass cradle crane curtain desk drum eagle engine falcon feather "
    "fence ferry fiddle flute forest fountain garden glove hammer harbour harvest hedge island jacket kettle ladder "
    "lantern lemon lighthouse lobster magnet maple market meadow mirror mitten needle notebook oak orchard otter oven "
    "paddle parcel pebble pencil pepper piano pillow pocket puzzle quilt rabbit ribbon river saddle sandal scarf "
    "shovel spoon stable sweater table teapot thimble tower trumpet tunnel turnip umbrella valley violin wagon walnut "
    "whistle willow window"
)

_SYLLABLES = ("b br c cl d dr f fl g gr h j k l m n p pl qu r s sh sl st t th tr v w z", "a e i o u ai ea ee ou")
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
_ONSETS, _VOWELS = (part.split() for part in _SYLLABLES)
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "nd", "rk", "st"]

FILLER = (
    "Rain had washed the road clean.",
    "A cart stood by the gate.",
    "The baker lit his oven again.",
    "Smoke rose over the roofs.",
    "Two gulls circled the pier.",
)


def compound(rng: Random) -> str:
    """An adjective and a noun joined by a hyphen."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def digits(rng: Random, count: int) -> str:
    """A number of exactly `count` digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def uuid(rng: Random) -> str:
    """128 random bits in UUID notation, without version bits."""
    return str(UUID(int=rng.getrandbits(128)))


def letters(rng: Random, count: int) -> str:
    """`count` random lower-case letters."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count))


def made_up(rng: Random, syllables: int = 2) -> str:
    """A pronounceable word that means nothing."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def distinct(draw: Iterator[str], used: set[str] | None = None) -> Iterator[str]:
    """The values of an endless iterator that were not seen before."""
    seen = set() if used is None else used
    for value in draw:
        if value not in seen:
            seen.add(value)
            yield value


def endless_words(rng: Random, syllables: int = 2, used: set[str] | None = None) -> Iterator[str]:
    """Endless distinct made-up words."""
    return distinct((made_up(rng, syllables) for _ in iter(int, 1)), used)


def names(rng: Random, used: set[str] | None = None) -> Iterator[str]:
    """Endless distinct made-up first and last names."""
    return distinct((f"{made_up(rng).title()} {made_up(rng, 3).title()}" for _ in iter(int, 1)), used)


def listing(items: list[str] | tuple[str, ...]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
