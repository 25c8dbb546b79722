"""Small things with one right answer, as conversations: tiny worlds with questions, counting, days, arithmetic, words, JSON, small talk.

Each maker takes a Random and gives messages. What a held-out check asks is kept out of training by `held_out`, never by luck.
"""

import json
import zlib
from collections.abc import Sequence
from random import Random

import words

Messages = list[dict]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty""".split()
NAMES = words.GIRLS + words.BOYS
LISTS = {
    "fruits": "apple banana pear peach plum cherry orange lemon grape mango kiwi melon".split(),
    "animals": "dog cat horse cow lion tiger bear fox rabbit mouse duck owl elephant zebra".split(),
    "colors": "red blue green yellow orange purple pink brown black white".split(),
    "vegetables": "carrot potato onion cabbage spinach pepper cucumber pumpkin bean".split(),
    "toys": "ball kite doll train puzzle drum yo-yo boat".split(),
    "countries": "France Spain Italy Germany Japan China India Brazil Canada Mexico Egypt Kenya".split(),
    "days of the week": DAYS,
    "months": MONTHS,
    "birds": "robin sparrow owl eagle duck goose parrot crow swan".split(),
    "clothes": "hat coat scarf sock shoe shirt dress mitten".split(),
}
OPPOSITES = """hot cold|big small|up down|happy sad|fast slow|day night|old young|tall short|wet dry|open closed|full empty|light dark
hard soft|loud quiet|near far|early late|clean dirty|strong weak|rich poor|left right|long short|good bad|first last|heavy light
high low|in out|on off|push pull|win lose|begin end|sweet sour|thick thin|true false|wide narrow|brave afraid""".replace("\n", "|").split(
    "|"
)
SOUNDS = """cow moo|dog woof|cat meow|duck quack|sheep baa|pig oink|horse neigh|lion roar|bee buzz|frog ribbit|mouse squeak|owl hoot
rooster cock-a-doodle-doo|snake hiss|crow caw|wolf howl|donkey hee-haw|hen cluck""".replace("\n", "|").split("|")
YOUNG = """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|duck duckling|pig piglet|hen chick|lion cub|goat kid|frog tadpole|bear cub
deer fawn|kangaroo joey|goose gosling|swan cygnet""".replace("\n", "|").split("|")
PLURALS = """dog dogs|cat cats|box boxes|mouse mice|child children|foot feet|tooth teeth|leaf leaves|baby babies|bus buses|sheep sheep|fish fish
man men|woman women|goose geese|city cities|knife knives|story stories|fox foxes|potato potatoes|book books|tree trees""".replace(
    "\n", "|"
).split("|")
PAST = """go went|see saw|eat ate|run ran|sing sang|swim swam|take took|give gave|come came|write wrote|fly flew|find found|make made
buy bought|think thought|sleep slept|walk walked|play played|jump jumped|drink drank|fall fell|know knew""".replace("\n", "|").split("|")
CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|England London|Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|Greece Athens
Portugal Lisbon|Austria Vienna|Poland Warsaw|Sweden Stockholm|Norway Oslo|Denmark Copenhagen|Finland Helsinki|Ireland Dublin|Canada Ottawa
Kenya Nairobi|Peru Lima|Cuba Havana|Turkey Ankara|Hungary Budapest|Belgium Brussels|Switzerland Bern|Australia Canberra|Brazil Brasilia
Argentina Buenos Aires|India New Delhi|Mexico Mexico City|Chile Santiago|Iceland Reykjavik|Thailand Bangkok|Korea Seoul""".replace(
    "\n", "|"
).split("|")
FACTS = """What color is the sky?=The sky is blue.|What color is grass?=Grass is green.|What color is snow?=Snow is white.
What color is a banana?=A banana is yellow.|What color is a tomato?=A tomato is red.|How many legs does a dog have?=A dog has four legs.
How many legs does a spider have?=A spider has eight legs.|How many legs does a bird have?=A bird has two legs.
How many legs does an ant have?=An ant has six legs.|How many days are in a week?=There are seven days in a week.
How many months are in a year?=There are twelve months in a year.|How many hours are in a day?=There are 24 hours in a day.
How many minutes are in an hour?=There are 60 minutes in an hour.|How many seconds are in a minute?=There are 60 seconds in a minute.
What do bees make?=Bees make honey.|Where do fish live?=Fish live in water.|What do cows eat?=Cows eat grass.|What do plants need?=Plants need water, light, and air.
Where does milk come from?=Milk comes from cows.|What is ice?=Ice is frozen water.|What is the sun?=The sun is a star. It gives us light and warmth.
What is the moon?=The moon is a big ball of rock that goes around the earth.|What planet do we live on?=We live on the planet Earth.
What season comes after winter?=Spring comes after winter.|What season comes after summer?=Autumn comes after summer.
What are the four seasons?=The four seasons are spring, summer, autumn, and winter.|What do you do with a pencil?=You write or draw with a pencil.
What do you wear on your feet?=You wear shoes on your feet.|What do you wear on your head?=You wear a hat on your head.
Why do we sleep?=We sleep to rest our body and our mind.|Why does it rain?=It rains when the drops of water in the clouds get too heavy and fall down.
What is a kite?=A kite is a light toy that flies in the wind on a long string.|What is a friend?=A friend is someone you like and trust and who helps you.
Can penguins fly?=No, penguins cannot fly, but they swim very well.|Can a fish walk?=No, a fish cannot walk. It swims.
What do you use an umbrella for?=You use an umbrella to stay dry in the rain.|Which animal is the biggest?=The blue whale is the biggest animal.
What is the tallest animal?=The giraffe is the tallest animal.|What is bread made of?=Bread is made of flour, water, and yeast.
What is the first letter of the alphabet?=The first letter of the alphabet is A.|What is the last letter of the alphabet?=The last letter of the alphabet is Z.
How many letters are in the alphabet?=There are 26 letters in the English alphabet.|What do caterpillars become?=Caterpillars become butterflies.
What is a library?=A library is a place where you can read and borrow books.|What does a baker do?=A baker makes bread and cakes.
What does a farmer do?=A farmer grows plants and keeps animals.|What does a doctor do?=A doctor helps people who are sick.
What does a teacher do?=A teacher helps people learn.|What is a rainbow?=A rainbow is a bow of colors in the sky. You can see it when the sun shines through rain.""".replace(
    "\n", "|"
).split("|")
HELLOS = "Hi|Hello|Hey|Hi there|Hello there|Good morning|Good evening|Good afternoon|hi|hello|hey|Hi!|Hello!|Hey!".split("|")
WELCOMES = """Hello! How can I help you?|Hi there! What can I do for you?|Hello! It is nice to meet you.|Hi! Would you like to hear a story?
Hello! What would you like to talk about?""".replace("\n", "|").split("|")
ME = """I am jaxllm's small default model.|I am the small default model of jaxllm.|I am a small language model, the one that comes with jaxllm."""
TALK = {
    "Who are you?|What are you?|What is your name?|Tell me about yourself.|who are you|What's your name?|Are you a robot?|Which model are you?": ME.replace(
        ".|", ". I can tell stories and answer simple questions.|"
    ),
    "Who made you?|Who trained you?|Where do you come from?": "I was trained from scratch for jaxllm, so that it has a model to start with.",
    "What can you do?|How can you help me?|help|What are you good at?": """I can tell short stories, answer simple questions, call tools, and \
write small pieces of JSON.|I am small, so I am best at simple stories, easy questions, and calling tools.""",
    "How are you?|How are you today?|How do you do?|how are you": "I am fine, thank you. How are you?|I am well, thank you! What can I do for you?",
    "Thank you!|Thanks!|Thank you very much.|thanks|That was great, thanks.": "You are welcome!|You are welcome. Is there anything else?",
    "Goodbye!|Bye!|bye|See you later.|Good night!": "Goodbye! Have a nice day.|Bye! See you soon.",
    "I am sad.|I feel sad today.|I had a bad day.": "I am sorry to hear that. Would you like to hear a story?|I am sorry. I hope that tomorrow is better.",
    "I am happy!|I had a good day.|I feel great.": "That is wonderful! I am glad to hear it.|How nice! What happened?",
    "Do you like stories?|Do you know any stories?": "Yes, I like stories very much. Shall I tell you one?",
    "Are you human?|Are you a person?|Are you alive?": "No, I am a computer program, a small language model.",
    "Can you speak French?|Do you speak German?|Do you know other languages?": "I am sorry, I only know simple English.",
    "What is the meaning of life?": "That is a big question, and I am a small model. Perhaps it is to be kind to each other.",
}


def chat(user: str, answer: str) -> Messages:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def held_out(what: str) -> bool:
    """One question in ten, the same ones for ever, is for the scorecard alone."""
    return zlib.crc32(what.encode()) % 10 == 0


def arithmetic(random: Random, held: bool = False) -> Messages:
    while True:
        sign = random.choice("++--*")
        top = 12 if sign == "*" else random.choice([10, 20, 20, 100])
        a, b = random.randint(0, top), random.randint(0, top)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        if held_out(f"{a}{sign}{b}") == held:
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    shown = random.choice([sign if sign != "*" else random.choice("*x"), word])
    ask = random.choice(["What is {}?", "What is {}?", "{} = ?", "Calculate {}.", "How much is {}?", "{}", "Please compute {}."])
    return chat(ask.format(f"{a} {shown} {b}"), f"{a} {shown} {b} {'is' if shown == word else '='} {result}{'.' if shown == word else ''}")


def counting(random: Random) -> Messages:
    kind = random.randrange(4)
    if kind == 0:
        a = random.randint(0, 60)
        b = a + random.randint(2, 15)
        return chat(random.choice([f"Count from {a} to {b}.", f"Please count from {a} to {b}."]), ", ".join(map(str, range(a, b + 1))))
    if kind == 1:
        a = random.randint(5, 20)
        b = random.randint(0, a - 3)
        return chat(f"Count down from {a} to {b}.", ", ".join(map(str, range(a, b - 1, -1))))
    if kind == 2:
        step = random.choice([2, 3, 5, 10])
        a, n = random.choice([0, step, 1]), random.randint(4, 10)
        return chat(f"Count by {step}s from {a} to {a + step * n}.", ", ".join(str(a + step * i) for i in range(n + 1)))
    a = random.randint(0, 99)
    return random.choice(
        [
            chat(f"What number comes after {a}?", f"{a + 1} comes after {a}."),
            chat(f"What number comes before {a + 1}?", f"{a} comes before {a + 1}."),
            chat(f"Write {a % 21} as a word.", NUMBERS[a % 21]),
            chat(f"Is {a} even or odd?", f"{a} is {'odd' if a % 2 else 'even'}."),
        ]
    )


def days(random: Random) -> Messages:
    names, what = random.choice([(DAYS, "day"), (MONTHS, "month")])
    i = random.randrange(len(names))
    here, after, before = names[i], names[(i + 1) % len(names)], names[i - 1]
    options = [
        chat(f"What {what} comes after {here}?", f"{after} comes after {here}."),
        chat(f"What {what} comes before {here}?", f"{before} comes before {here}."),
        chat(f"Which {what} is between {before} and {after}?", f"{here} is between {before} and {after}."),
    ]
    if what == "day":
        options += [
            chat(f"Today is {here}. What day is tomorrow?", f"Tomorrow is {after}."),
            chat(f"Today is {here}. What day was yesterday?", f"Yesterday was {before}."),
            chat("Name the days of the week.", f"The days of the week are {listed(DAYS)}."),
        ]
    else:
        options.append(chat("Name the months of the year.", f"The months of the year are {listed(MONTHS)}."))
    return random.choice(options)


def listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + ", and " + items[-1] if len(items) > 2 else " and ".join(items)


def vocabulary(random: Random) -> Messages:
    def pair(table):
        return random.choice(table).split(" ", 1)

    kind = random.randrange(9)
    if kind == 0:
        a, b = random.sample(pair(OPPOSITES), 2)
        return chat(random.choice([f"What is the opposite of {a}?", f"Opposite of {a}?"]), f"The opposite of {a} is {b}.")
    if kind == 1:
        a, b = pair(SOUNDS)
        return chat(f"What sound does a {a} make?", f"A {a} says {b}.")
    if kind == 2:
        a, b = pair(YOUNG)
        return chat(f"What is a baby {a} called?", f"A baby {a} is called a {b}.")
    if kind == 3:
        a, b = pair(PLURALS)
        return chat(f"What is the plural of {a}?", f"The plural of {a} is {b}.")
    if kind == 4:
        a, b = pair(PAST)
        return chat(f"What is the past tense of {a}?", f"The past tense of {a} is {b}.")
    if kind == 5:
        a, b = pair(CAPITALS)
        return chat(random.choice([f"What is the capital of {a}?", f"Which city is the capital of {a}?"]), f"The capital of {a} is {b}.")
    if kind == 6:
        what = random.choice([k for k in LISTS if k not in ("months", "days of the week")])
        n = random.randint(2, 6)
        return chat(
            random.choice([f"Name {NUMBERS[n]} {what}.", f"List {n} {what}.", f"Tell me {NUMBERS[n]} {what}."]),
            listed(random.sample(LISTS[what], n)).capitalize() + ".",
        )
    if kind == 7:
        word = random.choice([*words.THINGS, *words.ANIMALS, *words.FOODS]).split()[0]
        return random.choice(
            [
                chat(f'Spell the word "{word}".', "-".join(word.replace("-", ""))),
                chat(f'How many letters are in the word "{word}"?', f'The word "{word}" has {len(word)} letters.'),
                chat(f'What is the first letter of "{word}"?', f'The first letter of "{word}" is {word[0]}.'),
                chat(f'Say "{word}" three times.', f"{word}, {word}, {word}"),
                chat(f'Write "{word}" in capital letters.', word.upper()),
            ]
        )
    question, answer = random.choice(FACTS).split("=")
    return chat(question, answer)


def talk(random: Random) -> Messages:
    def turn():
        questions = random.choice(list(TALK))
        return chat(random.choice(questions.split("|")), random.choice(TALK[questions].split("|")))

    start = chat(random.choice(HELLOS), random.choice(WELCOMES)) if random.random() < 0.5 else []
    return start + [m for _ in range(random.choice([0, 1, 1, 2]) if start else 1) for m in turn()]


def world(random: Random) -> Messages:
    """A few facts in plain sentences, then one question that they answer."""
    facts, question, answer = random.choice([_owners, _moves, _counts, _taller, _wants])(random)
    text = " ".join(facts)
    return chat(random.choice([f"{text} {question}", f"{text}\n{question}", f"{text}\n\nQuestion: {question}"]), answer)


def _owners(random: Random):
    people, colors = random.sample(NAMES, 3), random.sample(words.COLORS, 3)
    things = random.sample([t for t in words.THINGS if t[0] not in "aeiou" and " " not in t], 3)
    facts = [f"{p} has a {c} {t}." for p, c, t in zip(people, colors, things, strict=True)]
    i = random.randrange(3)
    asks = [
        (f"What color is {people[i]}'s {things[i]}?", f"{people[i]}'s {things[i]} is {colors[i]}."),
        (f"Who has the {things[i]}?", f"{people[i]} has the {things[i]}."),
        (f"What does {people[i]} have?", f"{people[i]} has a {colors[i]} {things[i]}."),
    ]
    return facts, *random.choice(asks)


def _moves(random: Random):
    people, places = random.sample(NAMES, 3), random.sample(words.PLACES, 4)
    at = dict(zip(people, places, strict=False))
    facts = [f"{p} is {place}." for p, place in at.items()]
    if random.random() < 0.6:
        mover = random.choice(people)
        at[mover] = places[3]
        facts.append(f"Then {mover} goes to {places[3].split(' ', 1)[1]}.")
    who = random.choice(people)
    return facts, f"Where is {who} now?" if len(facts) > 3 else f"Where is {who}?", f"{who} is {at[who]}."


def _counts(random: Random):
    a, b = random.sample(NAMES, 2)
    thing = random.choice(["apples", "balls", "books", "shells", "cookies", "coins", "stones", "eggs"])
    n, m = random.randint(2, 15), random.randint(1, 9)
    if random.random() < 0.5:
        return [f"{a} has {n} {thing}.", f"{b} gives {a} {m} more."], f"How many {thing} does {a} have now?", f"{a} has {n + m} {thing}."
    m = min(m, n - 1)
    return [f"{a} has {n} {thing}.", f"{a} gives {m} to {b}."], f"How many {thing} does {a} have left?", f"{a} has {n - m} {thing} left."


def _taller(random: Random):
    a, b, c = random.sample(NAMES, 3)
    more, most, least = random.choice(
        [("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest")]
    )
    facts = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    random.shuffle(facts)
    return facts, *random.choice([(f"Who is the {most}?", f"{a} is the {most}."), (f"Who is the {least}?", f"{c} is the {least}.")])


def _wants(random: Random):
    a, b = random.sample(NAMES, 2)
    x, y = random.sample(words.FOODS, 2)
    who, what = random.choice([(a, x), (b, y)])
    return [f"{a} likes {x}.", f"{b} likes {y}."], f"What does {who} like?", f"{who} likes {what}."


def as_json(random: Random) -> Messages:
    """An object or list in JSON, from what is said or from what is asked for."""
    name, age, city = random.choice(NAMES), random.randint(3, 90), random.choice(CAPITALS).split(" ", 1)[1]
    animal, color = random.choice(list(words.ANIMALS)), random.choice(words.COLORS)
    thing = random.choice(list(words.THINGS))
    fields = {
        "name": (name, f"is named {name}"),
        "age": (age, f"is {age} years old"),
        "city": (city, f"lives in {city}"),
        "pet": (animal, f"has a pet {animal}"),
        "color": (color, f"likes the color {color}"),
        "toy": (thing, f"plays with a {thing}"),
        "happy": (True, "is happy"),
    }
    kind = random.randrange(6)
    if kind <= 2:
        keys = ["name", *random.sample(list(fields)[1:], random.randint(1, 4))]
        said = [fields[k][1] for k in keys[1:]]
        text = f"{name} {listed(said)}."
        ask = random.choice(
            [
                "Give me this as JSON: {text}",
                "Turn this into a JSON object with the keys {keys}: {text}",
                "{text} Answer in JSON with the keys {keys}.",
                "Write JSON with the keys {keys} for this sentence. {text}",
            ]
        )
        user = ask.format(keys=listed(keys), text=text)
        return chat(user, json.dumps({k: fields[k][0] for k in keys}))
    if kind == 3:
        what, n = random.choice(list(LISTS)), random.randint(2, 5)
        user = random.choice([f"Give me a JSON list of {n} {what}.", f"Write {NUMBERS[n]} {what} as a JSON array."])
        return chat(user, json.dumps(random.sample(LISTS[what], n)))
    if kind == 4:
        items = {random.choice(LISTS["fruits"]): random.randint(1, 20) for _ in range(random.randint(2, 4))}
        said = listed([f"{n} {k}" for k, n in items.items()])
        return chat(f"Write this shopping list as a JSON object with amounts: {said}.", json.dumps(items))
    keys = random.sample(["name", "age", "city", "pet", "color"], random.randint(2, 4))
    user = random.choice(
        ["Write a JSON object about a person with {}.", "Give me an example JSON object with the keys {}.", "JSON with {}, please."]
    )
    return chat(user.format(listed(keys)), json.dumps({k: fields[k][0] for k in keys}))


MAKERS = {arithmetic: 4, counting: 2, days: 1.5, vocabulary: 4, talk: 2.5, world: 5, as_json: 3}


def make(random: Random) -> Messages:
    maker = random.choices(list(MAKERS), list(MAKERS.values()))[0]
    messages = maker(random)
    while random.random() < 0.2:  # some conversations go on with another question
        messages = messages + random.choices(list(MAKERS), list(MAKERS.values()))[0](random)
    return messages
