"""Practice in reading a schema: real tool dialogues whose functions and parameters go by other names, and tools that exist nowhere.

A model that meets the same few functions again and again calls them by heart. Here a name says little and the description says it, so
that the only way to a right call is to read the list that the conversation gives.
"""

import json
import re
from collections.abc import Callable
from random import Random

import chores
import words
from tools import CITIES, SYSTEMS, call

Dialogue = tuple[list[dict], list[dict]]  # messages, tools
Rename = Callable[[str, dict], str]  # (name, what the schema says of it): the other name

# --- real dialogues, rewritten


def rewritten(messages: list[dict], offered: list[dict], function: Rename, key: Rename, random: Random, drop: float = 0.0) -> Dialogue:
    """(messages, tools) under other names, listed in another order. With `drop`, each optional parameter is gone with that probability,
    and a call's arguments come in the order of its schema."""
    kept: dict[str, dict[str, str]] = {}  # of each function, by its old name: its parameters' old and new names
    named: dict[str, str] = {}

    def tool(f: dict) -> dict:
        named[f["name"]] = function(f["name"], f)
        shown = list(f["parameters"]["properties"].items())
        random.shuffle(shown)
        required = f["parameters"]["required"]
        shown = [(k, v) for k, v in shown if k in required or not drop or random.random() >= drop]
        other = {k: key(k, v) for k, v in shown}
        kept.setdefault(f["name"], {}).update(other)  # two services of a dialogue may have a function of the same name
        parameters = f["parameters"] | {"properties": {other[k]: v for k, v in shown}, "required": [other[k] for k in required]}
        return f | {"name": named[f["name"]], "parameters": parameters}

    def made(c: dict) -> dict:
        f, other = c["function"], kept[c["function"]["name"]]
        given = json.loads(f["arguments"])
        arguments = {other[k]: given[k] for k in (other if drop else given) if k in other and k in given}
        return c | {"function": {"name": named[f["name"]], "arguments": json.dumps(arguments)}}

    listed = [t | {"function": tool(t["function"])} for t in offered]
    random.shuffle(listed)
    return [m | {"tool_calls": [made(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages], listed


def respelled(messages: list[dict], offered: list[dict], random: Random) -> Dialogue:
    """The same names in another spelling, or as they are."""
    name = random.choice([_same, _same, snake, camel])
    key = random.choice([_same, _same, camel]) if name is not _same else _same
    return rewritten(messages, offered, lambda old, _: name(old), lambda old, _: key(old), random)


def renamed(messages: list[dict], offered: list[dict], random: Random) -> Dialogue:
    """Other names, made from the words of the descriptions. A parameter has one name in the whole dialogue, in the tools' answers, too."""
    name, key = random.choice([(pascal, snake), (pascal, snake), (snake, snake), (camel, camel), (snake, camel)])
    keys: dict[str, str] = {}
    functions: dict[str, str] = {}

    def another(taken: dict[str, str], old: str, about: str, spell: Callable[[str], str]) -> str:
        for _ in range(20 if old not in taken else 0):
            new = spell("_".join(_some_words(old, about, random)))
            if new not in taken.values():
                taken[old] = new
        return taken.setdefault(old, spell(old))

    messages, listed = rewritten(
        messages,
        offered,
        lambda old, f: another(functions, old, f["description"], name),
        lambda old, p: another(keys, old, p["description"], key),
        random,
        drop=0.15,
    )
    return [m | {"content": _rekeyed(m["content"], keys)} if m["role"] == "tool" else m for m in messages], listed


_SMALL = set(
    """a an the of to for in on at by is are or and if whether boolean flag indicating which that their its it with from be as this be
where given optionally based other""".split()
)


def _some_words(old: str, about: str, random: Random) -> list[str]:
    """One to three words: mostly of the description, in its order; sometimes the old name's; sometimes of nothing at all."""
    draw = random.random()
    if draw < 0.15:
        return snake(old).split("_")
    if draw < 0.3:
        return random.choice([*words.THINGS, *words.ANIMALS]).replace("-", " ").split() + random.choice([[], ["value"], ["name"]])
    said = [w for w in re.findall(r"[a-z]+", about.lower()) if w not in _SMALL]
    if random.random() < 0.3:
        said += snake(old).split("_")
    said = list(dict.fromkeys(said))
    picked = sorted(random.sample(range(len(said)), min(len(said), random.choice([1, 2, 2, 3]))))
    return [said[i] for i in picked] or snake(old).split("_")


def _rekeyed(content: str, keys: dict[str, str]) -> str:
    """A tool's answer, a list of objects, with its keys renamed."""
    found = json.loads(content)
    return json.dumps([{keys.get(k, k): v for k, v in row.items()} for row in found]) if isinstance(found, list) else content


def _same(name: str) -> str:
    return name


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def pascal(name: str) -> str:
    return "".join(w.capitalize() for w in snake(name).split("_"))


def camel(name: str) -> str:
    return pascal(name)[:1].lower() + pascal(name)[1:]


# --- tools that exist nowhere

VERBS = """add book buy cancel change check clean close count create delete draw fetch find fix get list log make mark measure move open
order paint pause plan print rate read rename rent repair reserve save scan schedule sell send set share ship show sort start stop store
track update upload wash weigh wrap""".split()
KEYS = """age amount area author brand budget category city code color comment count country date day deadline depth destination device
distance duration email end flavor floor folder format gift group guest height hour id kind label language length level limit location
material method mode model month name note number owner page password person place position price priority quality quantity rank reason
room row score season seat section sender shape shelf size speed start state status street style subject table tag target team teacher
temperature theme time title topic type unit user version volume weight width winner year zone""".split()
EXTRA = "new old first last main max min total start end home work default current next".split()


def _syllables(random: Random) -> str:
    """A name that no text has: it can only be copied."""
    made = "".join(
        random.choice("bdfgklmnprstvz") + random.choice("aeiou") + random.choice(["", "", "n", "r", "l", "s"])
        for _ in range(random.randint(2, 4))
    )
    return made.capitalize()


def _text(random: Random) -> str:
    noun = random.choice([*words.THINGS, *words.ANIMALS, *words.FOODS])
    return random.choice(
        [
            noun,
            f"{random.choice(words.COLORS)} {noun}",
            random.choice(chores.NAMES),
            random.choice(CITIES),
            f"{_syllables(random)} {random.choice(['Street', 'Road', 'Hotel', 'Park', 'Villas', 'Bar', 'Cafe', 'Hall'])}",
            f"{random.choice(chores.NAMES)} {_syllables(random)}",
            f"{random.choice('ABCDEFGHKLMNPRST')}{random.randint(1, 999)}",
            f"2019-{random.randint(1, 12):02d}-{random.randint(1, 28):02d}",
            f"{random.randint(0, 23):02d}:{random.choice(['00', '15', '30', '45'])}",
        ]
    )


def _enum(random: Random) -> list[str]:
    return random.sample(random.choice([words.COLORS, chores.DAYS, CITIES, list(words.ANIMALS), words.FOODS, EXTRA]), random.randint(2, 5))


def _parameter(random: Random) -> tuple[str, dict]:
    """(what it is called in plain words, its schema)."""
    said = " ".join(random.sample(EXTRA, random.choice([0, 0, 1])) + random.sample(KEYS, random.choice([1, 1, 2])))
    kind = random.choice("string string string integer integer number boolean array enum enum".split())
    about = random.choice(["The {}", "{}", "Value of the {}", "{} to use", "Which {} it is"]).format(said)
    schema: dict = {"type": "string" if kind == "enum" else kind, "description": about[:1].upper() + about[1:]}
    if kind == "enum":
        schema["enum"] = _enum(random)
    if kind == "array":
        schema["items"] = {"type": "string"}
    return said, schema


def _value(schema: dict, random: Random) -> tuple[object, str]:
    """(a value that fits, how somebody says it)."""
    if "enum" in schema:
        value = random.choice(schema["enum"])
        return value, value
    if schema["type"] == "array":
        items = [_text(random) for _ in range(random.randint(1, 3))]
        return items, chores.listed(items)
    if schema["type"] == "boolean":
        value = random.random() < 0.5
        return value, random.choice(["yes", "true"] if value else ["no", "false"])
    if schema["type"] == "string":
        value = _text(random)
        return value, value
    value = random.randint(0, random.choice([9, 99, 9999]))
    value = value + random.choice([0.5, 0.25, 0.1]) if schema["type"] == "number" and random.random() < 0.5 else value
    return value, str(value)


def _tool(random: Random) -> tuple[str, dict[str, str], dict]:
    """(what it does in plain words, its parameters' names in plain words by key, the tool)."""
    spell = random.choice([snake, snake, camel, pascal])
    does = f"{random.choice(VERBS)} {random.choice([*words.THINGS, *words.ANIMALS, *words.FOODS]).replace('-', ' ')}"
    said = dict(_parameter(random) for _ in range(random.choice([0, 1, 1, 2, 2, 3, 3, 4, 5])))
    key = camel if spell is camel else snake
    keys = {
        key(name.replace(" ", "_")) if random.random() < 0.9 else f"{random.choice('abcdexyz')}{i}": name for i, name in enumerate(said)
    }
    required = [k for k in keys if random.random() < 0.6]
    parameters = {"type": "object", "properties": {k: said[name] for k, name in keys.items()}, "required": required}
    about = random.choice(["{}", "{}.", "Lets you {}", "Use this to {}"]).format(does)
    name = spell(does.replace(" ", "_"))
    return (
        does,
        keys,
        {"type": "function", "function": {"name": name, "description": about[:1].upper() + about[1:], "parameters": parameters}},
    )


ASKS = ["Please {}", "I want to {}", "{}", "Can you {}", "Could you {} for me", "Let's {}", "I need to {}"]


def _ask(does: str, given: dict[str, str], random: Random) -> str:
    """A wish with its values (how they are said, by their plain names), in one of the ways that people say such things."""
    verb, what = does.split(" ", 1)
    wish = random.choice(ASKS).format(f"{verb} {random.choice(['the', 'a', 'my'])} {what}")
    if not given:
        return wish + "."
    form, glue = random.choice(
        [("{k} {v}", ", "), ("the {k} is {v}", ", "), ("{k}: {v}", "\n"), ("{k} = {v}", ", "), ("{v} as the {k}", ", ")]
    )
    parts = [form.format(k=k, v=v) for k, v in given.items()]
    if glue == "\n":
        return f"{wish}.\n" + "\n".join(parts)
    return wish + random.choice([" with ", ". Use ", ": ", ", "]) + glue.join(parts) + "."


def _turn(does: str, keys: dict[str, str], tool: dict, random: Random, number: int) -> list[dict]:
    f = tool["function"]
    required, properties = f["parameters"]["required"], f["parameters"]["properties"]
    used = [k for k in keys if k in required or random.random() < 0.5]
    values = {k: _value(properties[k], random) for k in used}
    given = {keys[k]: values[k][1] for k in random.sample(used, len(used))}
    missing = random.choice(required) if required and random.random() < 0.2 else None
    later = given.pop(keys[missing]) if missing else ""
    messages = [{"role": "user", "content": _ask(does, given, random)}]
    if missing:
        messages += [{"role": "assistant", "content": f"What is the {keys[missing]}?"}, {"role": "user", "content": later}]
    result = {random.choice(["id", "number", "code"]): random.randint(1, 999)} if random.random() < 0.5 else {"status": "ok"}
    said = "".join(f" The {k} is {v}." for k, v in result.items() if k != "status")
    arguments = {k: values[k][0] for k in properties if k in values}
    return [
        *messages,
        call(f["name"], arguments, number),
        {"role": "tool", "tool_call_id": f"call_{number}", "content": json.dumps(result)},
        {"role": "assistant", "content": random.choice(["Done.", "That is done.", "It is done."]) + said},
    ]


def make(random: Random) -> Dialogue:
    """(messages, tools): one to three turns over one to six tools that exist nowhere."""
    offered = {
        t["function"]["name"]: (does, keys, t) for does, keys, t in (_tool(random) for _ in range(random.choice([1, 2, 2, 3, 4, 5, 6])))
    }
    system = random.choice(SYSTEMS)
    messages = [{"role": "system", "content": system}] if system else []
    for number in range(1, random.choice([1, 2, 2, 3]) + 1):
        messages += _turn(*random.choice(list(offered.values())), random, number)
    return messages, [tool for _, _, tool in offered.values()]
