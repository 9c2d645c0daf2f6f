"""Small worlds in the manner of bAbI (Weston et al., 2015): people move, carry and hand over things; places lie beside
each other. A world tells its facts in order and knows the answer of its question and the facts that support it."""

from dataclasses import dataclass
from random import Random

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
OBJECTS = ("apple", "football", "milk")
_MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TAKES = ("took", "got", "grabbed", "picked up")
_DROPS = ("dropped", "left", "put down", "discarded")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """Facts in order, a question, its answer, the labels that an answer may name, and indices of supporting facts."""

    facts: tuple[str, ...]
    question: str
    answer: str
    labels: tuple[str, ...]
    support: tuple[int, ...]


def whereabouts(rng: Random) -> Story:
    """qa1: one supporting fact. Where is a person after the last move?"""
    facts, last = [], {}
    for i in range(rng.randint(2, 10)):
        person, place = rng.choice(PEOPLE), rng.choice(PLACES)
        facts.append(f"{person} {rng.choice(_MOVES)} the {place}.")
        last[person] = (place, i)
    person = rng.choice(sorted(last))
    place, i = last[person]
    return Story(tuple(facts), f"Where is {person}?", place, PLACES, (i,))


class _Carrying:
    """People who walk about and carry things; keeps the trail of every thing as (place, facts that say so)."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.facts: list[str] = []
        self.place: dict[str, tuple[str, int]] = {}
        self.holder: dict[str, tuple[str, int]] = {}
        self.trail: dict[str, list[tuple[str, tuple[int, ...]]]] = {thing: [] for thing in OBJECTS}

    def tell(self, text: str) -> int:
        self.facts.append(text)
        return len(self.facts) - 1

    def move(self, person: str) -> None:
        here = self.place.get(person, ("", 0))[0]
        place = self.rng.choice([p for p in PLACES if p != here])
        fact = self.tell(f"{person} {self.rng.choice(_MOVES)} the {place}.")
        self.place[person] = (place, fact)
        for thing, (holder, taken) in self.holder.items():
            if holder == person:
                self.trail[thing].append((place, (taken, fact)))

    def step(self) -> None:
        person = self.rng.choice(PEOPLE)
        held = sorted(thing for thing, (holder, _) in self.holder.items() if holder == person)
        free = [thing for thing in OBJECTS if thing not in self.holder and self._near(thing, person)]
        choice = self.rng.random()
        if person not in self.place or choice < 0.5:
            self.move(person)
        elif choice < 0.75 and free:
            thing = self.rng.choice(free)
            fact = self.tell(f"{person} {self.rng.choice(_TAKES)} the {thing}.")
            self.holder[thing] = (person, fact)
            place, came = self.place[person]
            if not self.trail[thing] or self.trail[thing][-1][0] != place:
                self.trail[thing].append((place, (fact, came)))
        elif held:
            thing = self.rng.choice(held)
            fact = self.tell(f"{person} {self.rng.choice(_DROPS)} the {thing}.")
            del self.holder[thing]
            place, support = self.trail[thing][-1]
            self.trail[thing][-1] = (place, (*support, fact))

    def _near(self, thing: str, person: str) -> bool:
        """A thing that nobody has touched may be anywhere; else it lies where it was dropped."""
        return not self.trail[thing] or (person in self.place and self.trail[thing][-1][0] == self.place[person][0])


def _carried(rng: Random, facts: int, stops: int) -> tuple[_Carrying, str]:
    """A world of at least `facts` facts in which some thing was in `stops` places."""
    for _ in range(1000):
        world = _Carrying(rng)
        while len(world.facts) < facts:
            world.step()
        known = [thing for thing in OBJECTS if len(world.trail[thing]) >= stops]
        if known:
            return world, rng.choice(known)
    raise RuntimeError("no world with a thing that moved; this cannot happen with working dice")


def carried(rng: Random) -> Story:
    """qa2: two supporting facts. Where is a thing now?"""
    world, thing = _carried(rng, rng.randint(6, 24), 1)
    place, support = world.trail[thing][-1]
    return Story(tuple(world.facts), f"Where is the {thing}?", place, PLACES, tuple(sorted(support)))


def before(rng: Random) -> Story:
    """qa3: three supporting facts. Where was a thing before it came to a place (its last)?"""
    world, thing = _carried(rng, rng.randint(14, 50), 2)
    (place, first), (last, second) = world.trail[thing][-2:]
    question = f"Where was the {thing} before the {last}?"
    return Story(tuple(world.facts), question, place, PLACES, tuple(sorted({*first, *second})))


def relations(rng: Random) -> Story:
    """qa4: two places beside a third. What lies in a direction of a place, or of what place does it lie so?"""
    left, middle, right = rng.sample(PLACES, 3)
    way, other = rng.choice([(a, b) for a in _OPPOSITE for b in _OPPOSITE if a != b])
    facts = [f"The {left} is {way} of the {middle}.", f"The {right} is {other} of the {middle}."]
    order = rng.sample(range(2), 2)
    told = tuple(facts[i] for i in order)
    if rng.random() < 0.5:
        return Story(told, f"What is {way} of the {middle}?", left, PLACES, (order.index(0),))
    return Story(told, f"What is the {left} {way} of?", middle, PLACES, (order.index(0),))


def giving(rng: Random) -> Story:
    """qa5: three arguments. Who gave what to whom, last?"""
    gifts = []
    for _ in range(rng.randint(2, 10)):
        giver, taker = rng.sample(GIVERS, 2)
        gifts.append((giver, rng.choice(OBJECTS), taker))
    facts = tuple(
        f"{giver} {rng.choice(('gave', 'handed', 'passed'))} the {o} to {taker}." for giver, o, taker in gifts
    )
    last = len(gifts) - 1
    giver, thing, taker = gifts[last]
    asks = {
        "thing": (f"What did {giver} give to {taker} last?", thing),
        "giver": (f"Who gave the {thing} to {taker} last?", giver),
        "taker": (f"To whom did {giver} give the {thing} last?", taker),
    }
    question, answer = asks[rng.choice(sorted(asks))]
    return Story(facts, question, answer, (*GIVERS, *OBJECTS), (last,))


WORLDS = {"qa1": whereabouts, "qa2": carried, "qa3": before, "qa4": relations, "qa5": giving}
