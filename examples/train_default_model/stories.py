"""Tells stories from stories.grammar: somebody, a friend, perhaps a thing, one plot, and words that agree from beginning to end.

`Story.tell` gives the text and what it is about, so that a request can name exactly that. Everything is chosen by one random.Random.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import words

STRANGERS = {"hungry", "finder", "newfriend", "storm", "noise", "lostchild"}  # plots in which the friend is met on the way
THEMES = {
    "lost": ["losing something", "finding a lost toy", "friends who help each other"],
    "stuck": ["a windy day", "teamwork", "asking for help"],
    "share": ["sharing", "learning to share", "taking turns"],
    "gift": ["a birthday present", "giving", "working hard for a present"],
    "finder": ["being honest", "finding something that belongs to someone else", "honesty"],
    "skill": ["never giving up", "learning something new", "practice"],
    "fear": ["being brave", "courage", "overcoming fear"],
    "newfriend": ["making a new friend", "friendship", "being shy"],
    "bake": ["baking", "cooking together", "making a mistake and trying again"],
    "hungry": ["kindness", "sharing food", "helping someone who is hungry"],
    "seed": ["patience", "a seed", "growing a plant", "waiting"],
    "race": ["a race", "being a good friend", "winning and losing"],
    "storm": ["a storm", "helping a neighbor", "a rainy night"],
    "honest": ["telling the truth", "a mistake", "saying sorry"],
    "map": ["a treasure", "a treasure map", "an adventure"],
    "lostchild": ["getting lost", "finding the way home", "asking for help"],
    "noise": ["a strange noise in the night", "bedtime", "a scary night"],
    "tidy": ["cleaning up", "a messy room", "helping at home"],
    "helpbird": ["a little bird", "taking care of animals", "kindness to animals"],
    "borrow": ["keeping a promise", "a promise", "borrowing something"],
    "moon": ["the moon", "a clear night", "a wish"],
    "snow": ["the first snow", "winter", "building a snowman"],
    "tiny": ["friendship", "being kind"],
}
OPENINGS = """Once upon a time, there was {Hero}. {Trait}
Once upon a time, {Hero} lived {near home}. {Trait}
There once was {Hero} who loved to {like}. {Trait}
In a small house {near home} lived {Hero}. {Trait}
{Hero} lived {near home}. {^he} loved to {like}. {Bond}
Once there was {Hero}. Every day, {he} liked to {like}. {Bond}
Long ago, there was {Hero} who lived {near home}. {Bond}
This is the story of {Hero}. {Trait} {Bond}
Once upon a time, there was {Hero}. {^he} loved to {like}.
Once upon a time, {near home}, there lived {Hero}. {Trait} {Bond}""".split("\n")
ENDINGS = """And that is the end of the story.|The end.|They were the best of friends from that day on.|It had been a very good day.
And they lived happily ever after.|{H} went to sleep that night with a happy heart.|And they never forgot that {day}.
{H} smiled all the way home.|That night, {H} dreamed of new adventures.""".replace("\n", "|").split("|")


@cache
def plots() -> dict[str, tuple[str, list]]:
    """Name: (what it needs, beats); a beat is (alternatives, may be left out) or None for the end of a paragraph."""
    found: dict[str, tuple[str, list]] = {}
    beats, lines = [], []

    def close(optional=False):
        if lines:
            beats.append((tuple(lines), optional))
            lines.clear()

    for line in (Path(__file__).with_name("stories.grammar").read_text() + "\n== end: any").splitlines():
        if line.startswith("=="):
            close()
            name, needs = line[2:].split(":")
            beats = []
            found[name.strip()] = (needs.strip(), beats)
        elif line in ("-", "-?"):
            close(line == "-?")
        elif line == "/":
            close()
            beats.append(None)
        elif line.strip() and not line.startswith("#"):
            lines.append(line)
    del found["end"]
    return found


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" and not noun.startswith(("uni", "one")) else "a"


def pick_inner(text: str, random: Random) -> str:
    while match := re.search(r"\[([^\[\]]*)\]", text):
        text = text[: match.start()] + random.choice(match[1].split("|")) + text[match.end() :]
    return text


@dataclass
class Somebody:
    kind: str
    name: str | None
    female: bool
    size: str = ""

    @property
    def called(self) -> str:
        return self.name or f"the {self.kind}"

    @property
    def introduced(self) -> str:
        first = " ".join(w for w in (self.size, self.kind) if w)
        return f"{article(first)} {first}" + (f" named {self.name}" if self.name else "")

    def pronoun(self, which: str) -> str:
        return {"he": ("he", "she"), "him": ("him", "her"), "his": ("his", "her"), "himself": ("himself", "herself")}[which][self.female]


def somebody(random: Random, kind: str | None = None, name: str | None = None, other: Somebody | None = None) -> Somebody:
    """Someone of a kind or of any; never the same name or the same animal as `other`."""
    while True:
        chosen = kind or random.choice(
            random.choice([["girl", "boy"], ["girl", "boy"], list(words.ANIMALS), list(words.ANIMALS), list(words.PEOPLE)])
        )
        female = chosen in words.FEMALE or (chosen not in words.MALE and random.random() < 0.5)
        if name:
            female = name in words.GIRLS
        given = name or random.choice(words.GIRLS if female else words.BOYS)
        if (chosen in words.NAMELESS and not name) or (chosen not in ("girl", "boy") and not name and random.random() < 0.2):
            given = None
        if other and ((given == other.name and given) or (chosen == other.kind and (not given or not other.name))):
            if kind and (not given or not other.name):
                name = random.choice(words.GIRLS if female else words.BOYS)
            continue
        size = random.choice(words.SIZES) if random.random() < 0.8 and " " not in chosen and chosen != "giant" else ""
        if chosen in ("king", "queen") and size in ("tiny", "little", "small"):
            size = "kind"
        return Somebody(chosen, given, female, size)


@dataclass
class Story:
    text: str
    plot: str
    hero: Somebody
    friend: Somebody
    thing: str | None
    extra: dict[str, str] = field(default_factory=dict)


def thing_words(thing: str, random: Random) -> tuple[list[str], str]:
    if thing in words.FOODS:
        return random.sample(words.FOOD_ADJ, 2), f"eat the {thing}"
    adjectives, play = ({**words.LIGHT, **words.THINGS}.get(thing) or f"new wonderful pretty|play with the {thing}").split("|")
    return adjectives.split(), play


def choose_thing(needs: str, random: Random) -> str | None:
    if needs == "food":
        return random.choice(words.FOODS)
    if needs == "light":
        return random.choice(list(words.LIGHT))
    if needs == "thing":
        return random.choice([random.choice(list(words.LIGHT)), random.choice(list(words.THINGS)), random.choice(list(words.THINGS))])
    return None


def fits(thing: str, needs: str) -> bool:
    return {"thing": thing not in words.FOODS, "light": thing in words.LIGHT, "food": thing in words.FOODS, "any": False}[needs]


def tell(random: Random, *, hero: str | None = None, name: str | None = None, thing: str | None = None, plot: str | None = None) -> Story:
    """A story about these, or about whatever comes up."""
    if plot is None:
        # A plot that needs a thing that fits; the two plots with wind get their share although few things are light.
        fitting = [p for p, (needs, _) in plots().items() if p != "tiny" and (thing is None or fits(thing, needs))]
        weights = [3 if thing and plots()[p][0] == "light" else 1 for p in fitting]
        plot = random.choices(fitting, weights)[0] if random.random() > 0.03 or thing in words.FOODS else "tiny"
    needs, beats = plots()[plot]
    thing = thing or choose_thing(needs, random)
    who = somebody(random, hero, name)
    friend = somebody(random, other=who)
    return _Teller(random, plot, who, friend, thing).tell(beats)


class _Teller:
    def __init__(self, random: Random, plot: str, hero: Somebody, friend: Somebody, thing: str | None):
        self.random, self.plot, self.hero, self.friend, self.thing = random, plot, hero, friend, thing
        adjectives, play = thing_words(thing, random) if thing else ([], "")
        color = random.choice(words.COLORS)
        adjective = random.choice([*adjectives, color]) if adjectives else color
        human = hero.kind in ("girl", "boy")
        adult = random.choice(words.ADULTS if human else words.ANIMAL_ADULTS).replace("{his}", hero.pronoun("his"))
        likes = {**words.ANIMALS, **words.PEOPLE}.get(hero.kind, "sing songs|take long walks").split("|")
        like = random.choice(likes).replace("its", hero.pronoun("his")).replace(" it ", f" {hero.pronoun('he')} ")
        skill = random.choice(words.SKILLS).replace("{his}", hero.pronoun("his"))
        place = random.choice(words.PLACES)
        self.extra = {"skill": skill, "fear": random.choice(words.FEARS)}
        self.slots = {
            "thing": thing or "",
            "food": thing or "",
            "adj": adjective,
            "color": color,
            "play": play,
            "adult": adult,
            "like": like,
            "place": place.split(" ", 1)[1],
            "in": place,
            "home": random.choice([p for p in words.PLACES if p != place]).split(" ", 1)[1],
            "day": random.choice(["day", "day", "morning", "afternoon"]),
            "evening": random.choice(["evening", "night", "evening"]),
            "weather": random.choice("sunny windy warm cloudy bright cold fine".split()),
            "trait": random.choice(words.TRAITS),
            "ftrait": random.choice(words.TRAITS),
            "Hname": hero.name or f"little {hero.kind}",
            "H": hero.called,
            "F": friend.called,
            "Hero": hero.introduced,
            **self.extra,
            **{which: hero.pronoun(which) for which in ("he", "him", "his", "himself")},
            **{"f" + which: friend.pronoun(which) for which in ("he", "him", "his")},
        }
        self.met = False

    def tell(self, beats: list) -> Story:
        random = self.random
        first = self._opening() if self.plot != "tiny" else ""
        paragraphs = [[first]] if random.random() < 0.6 else [[first], []]
        for beat in beats:
            if beat is None:
                paragraphs.append([])
            elif not (beat[1] and random.random() < 0.5):
                text = self._fill(random.choice(beat[0]))
                if self.plot == "tiny":
                    text = text.replace(self.hero.called, self.hero.introduced, 1)
                paragraphs[-1].append(text)
        if random.random() < 0.35:
            paragraphs[-1].append(self._fill(random.choice(ENDINGS)))
        text = "\n\n".join(" ".join(filter(None, p)) for p in paragraphs if any(p))
        return Story(capitals(text), self.plot, self.hero, self.friend, self.thing, self.extra)

    def _opening(self) -> str:
        line = self.random.choice(OPENINGS)
        bond = self.plot not in STRANGERS and self.random.random() < 0.6
        if bond:
            self.met = "{Bond}" in line
        line = line.replace("{Bond}", self.random.choice(_BONDS).format(self.friend.introduced) if bond else "")
        line = line.replace("{Trait}", self.random.choice(_TRAITS))
        return re.sub("  +", " ", self._fill(line)).strip()

    def _fill(self, line: str) -> str:
        line = pick_inner(line, self.random)
        text = re.sub(r"\{(\^?)([^}]*)\}('s)?", self._slot, line)
        return text[:1].upper() + text[1:]

    def _slot(self, match: re.Match) -> str:
        upper, name, possessive = match[1], match[2], match[3] or ""
        if name == "F" and not self.met:
            self.met = True
            text = self._first_meeting(possessive)
        elif name.startswith(("a ", "A ")):
            phrase = " ".join(self.slots[word] for word in name[2:].split())
            phrase = f"{article(phrase)} {phrase}" if self.thing not in words.MASS else f"some {phrase}"
            text = phrase.capitalize() if name[0] == "A" else phrase
        elif name == "in place":
            text = self.slots["in"]
        elif name.startswith("near "):
            text = "near " + self.slots[name[5:]]
        else:
            text = self.slots[name]
        text += possessive
        return text[:1].upper() + text[1:] if upper else text

    def _first_meeting(self, possessive: str) -> str:
        friend, his = self.friend, self.hero.pronoun("his")
        if self.plot in STRANGERS:
            return friend.introduced
        if not friend.name:
            return f"{his} friend, the {friend.kind}" + ("," if not possessive else "")
        if possessive or friend.kind in ("girl", "boy"):
            return f"{his} friend {friend.name}"
        return self.random.choice([f"{his} friend {friend.name} the {friend.kind}", f"{friend.name} the {friend.kind}"])


_BONDS = ["{{^his}} best friend was {}.", "{{^he}} had a good friend, {}.", "{{H}} often played with {}."]
_TRAITS = ["{H} was {trait}.", "{H} was {trait}, and {he} loved to {like}.", "{^he} was {trait}.", "Everybody liked {him}.", "", ""]


def capitals(text: str) -> str:
    """A capital letter where a sentence begins: after a stop. What follows a closing quote may be "said he", so a beat sees to itself."""
    return re.sub(r'(^|\n|[.!?] )("?)([a-z])', lambda m: m[1] + m[2] + m[3].upper(), text)


def subject(story: Story, random: Random) -> str:
    """What to ask for to get this story: at least one of its somebody, thing, friend and theme."""
    hero = story.hero
    plain = f"{article(hero.kind)} {hero.kind}"
    sized = f"{article(hero.size)} {hero.size} {hero.kind}" if hero.size else plain
    named = f"{plain} named {hero.name}" if hero.name else plain
    who = random.choice([plain, plain, sized, named])
    options = [who, f"{who} and {article(story.friend.kind)} {story.friend.kind}" if story.friend.kind != hero.kind else who]
    if story.thing:
        the = story.thing if story.thing in words.MASS else f"{article(story.thing)} {story.thing}"
        options += [f"{who} and {the}"] * 4 + [f"{the}", f"{who} who has {the}"]
    if story.plot == "skill":
        options += [f"{who} who wants to learn to {story.extra['skill']}"] * 2
    if story.plot == "fear":
        options += [f"{who} who is afraid of {story.extra['fear']}"] * 2
    theme = random.choice(THEMES[story.plot])
    options += [theme, f"{who} and {theme}"]
    return random.choice(options)


ASKS = """Tell me a story about {}.|Write a story about {}.|Can you tell me a story about {}?|Please write a short story about {}.
Tell me a short story about {}.|I would like a story about {}.|Write a short children's story about {}.|Tell a bedtime story about {}.
Please tell me a story about {}.|Could you write a story about {}?|Make up a story about {}.|a story about {}|Story about {}, please.
Do you know a story about {}?|Write me a little story about {}.|My child wants to hear a story about {}.|Give me a story about {}.
tell me a story about {}|Write a simple story about {}.|Let's hear a story about {}.""".replace("\n", "|").split("|")
ASKS_ANYTHING = """Tell me a story.|Write a story.|Can you tell me a story?|Please tell me a bedtime story.|I want a story!
Tell me something nice.|Write a short story for children.|Tell me another story.|I can't sleep. Tell me a story.""".replace(
    "\n", "|"
).split("|")


def ask(story: Story, random: Random) -> str:
    if random.random() < 0.06:
        return random.choice(ASKS_ANYTHING)
    return random.choice(ASKS).format(subject(story, random))
