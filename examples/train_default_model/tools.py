"""Conversations with small tools: a call when one is due, a question when something is missing, plain words when no tool fits.

Names of tools and of their parameters vary, so that a model learns to read the list it is given and not to remember ours.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import chores
import stories
import words

CITIES = (
    [pair.split(" ", 1)[1] for pair in chores.CAPITALS]
    + """New York|Chicago|Boston|Seattle|Toronto|Mumbai|Munich|Naples|Osaka|Lyon|Porto
Leeds|Denver|Austin|San Jose|Oakland""".replace("\n", "|").split("|")
)
LANGUAGES = "French German Spanish Italian Japanese Chinese Dutch Swedish Polish Greek".split()
SONGS = """Twinkle Twinkle Little Star|Yellow Moon|Summer Rain|Happy Day|Blue River|The Old Mill|Dancing Stars|Morning Light|Green Hills
Silver Bells|Over the Bridge|Sleepy Town""".replace("\n", "|").split("|")
MESSAGES = """I will be late|dinner is ready|see you tomorrow|happy birthday|please call me|the meeting is at noon|I found your keys|thank you
we won the game|the train is late|bring some milk|good night""".replace("\n", "|").split("|")
TASKS = """buy milk|water the plants|call Grandma|feed the cat|do the homework|pay the rent|clean the kitchen|read the book|send the letter
pack the bags|walk the dog|book the tickets""".replace("\n", "|").split("|")
TOPICS = """whales|the moon|old castles|bread|volcanoes|chess|trains|butterflies|the Roman Empire|planets|penguins|kites|rainbows|bicycles
coral reefs|honey bees|deserts|pianos""".replace("\n", "|").split("|")
ROOMS = "kitchen|bedroom|living room|bathroom|garage|hall|office|garden".split("|")
CUISINES = "Italian Indian Chinese Mexican Thai Japanese French Greek".split()
MONTHS = chores.MONTHS


def _date(random: Random) -> str:
    return f"{random.choice(MONTHS)} {random.randint(1, 28)}"


def _time(random: Random) -> str:
    return f"{random.randint(0, 23):02d}:{random.choice(['00', '15', '30', '45', '10', '20'])}"


@dataclass(frozen=True)
class Parameter:
    names: str  # what it may be called
    type: str
    about: str
    draw: Callable[[Random], object]
    enum: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Tool:
    names: str
    about: str
    parameters: tuple[Parameter, ...]
    asks: str  # {0}, {1}: the parameters' values; an ask that leaves out an optional one does not name it
    result: Callable[[Random, list], dict]
    says: str  # the answer, from the result's values
    missing: str = ""  # an ask without the first parameter | what to ask back


def _of(items) -> Callable[[Random], object]:
    return lambda random: random.choice(items)


CITY = Parameter("city|location|place|town", "string", "Name of the city", _of(CITIES))
TOOLS = [
    Tool("get_weather|getWeather|weather|current_weather|GetWeather", "Get the weather in a city", (CITY, ),
         "What is the weather in {0}?|How is the weather in {0} today?|Is it raining in {0}?|weather in {0}|Tell me the weather in {0}.|Do I need a coat in {0}?",
         lambda r, v: {"temperature": r.randint(-10, 35), "condition": r.choice(["sunny", "rainy", "cloudy", "windy", "snowy"])},
         "It is {condition} in {0}, and the temperature is {temperature} degrees.", "What is the weather like?|For which city?"),
    Tool("get_forecast|weather_forecast|forecast", "Get the weather forecast for a city and a day",
         (CITY, Parameter("day|date", "string", "Day of the week", _of(chores.DAYS))),
         "What will the weather be in {0} on {1}?|Will it rain in {0} on {1}?|Forecast for {0} on {1}, please.",
         lambda r, v: {"forecast": r.choice(["sun", "rain", "clouds", "snow", "wind"])}, "The forecast for {0} on {1} is {forecast}."),
    Tool("get_time|current_time|getTime|clock", "Get the current time in a city", (CITY,),
         "What time is it in {0}?|Tell me the time in {0}.|How late is it in {0}?|time in {0}",
         lambda r, v: {"time": _time(r)}, "It is {time} in {0}.", "What time is it?|In which city?"),
    Tool("calculate|calculator|compute|evaluate", "Calculate the value of an expression",
         (Parameter("expression|formula|input", "string", "The expression", lambda r: f"{r.randint(2, 999)} {r.choice('+-*/')} {r.randint(2, 99)}"),),
         "What is {0}?|Calculate {0}.|Please compute {0} for me.|{0}",
         lambda r, v: {"result": r.randint(1, 9999)}, "The result is {result}."),
    Tool("add|add_numbers|sum", "Add two numbers",
         (Parameter("a|x|first", "integer", "First number", lambda r: r.randint(1, 5000)), Parameter("b|y|second", "integer", "Second number", lambda r: r.randint(1, 5000))),
         "Add {0} and {1}.|What is the sum of {0} and {1}?|How much is {0} plus {1}?",
         lambda r, v: {"sum": v[0] + v[1]}, "{0} plus {1} is {sum}."),
    Tool("set_alarm|create_alarm|alarm|SetAlarm", "Set an alarm", (Parameter("time|at|when", "string", "Time in the form HH:MM", _time),),
         "Set an alarm for {0}.|Wake me up at {0}.|Please set the alarm to {0}.|alarm at {0}",
         lambda r, v: {"status": "ok"}, "Your alarm is set for {0}.", "Set an alarm, please.|For what time?"),
    Tool("set_timer|start_timer|timer", "Start a timer", (Parameter("minutes|duration|length", "integer", "Length in minutes", lambda r: r.randint(1, 90)),),
         "Set a timer for {0} minutes.|Start a {0} minute timer.|Please count down {0} minutes.",
         lambda r, v: {"status": "started"}, "I have started a timer for {0} minutes.", "Start a timer.|For how many minutes?"),
    Tool("send_message|sendMessage|send_text|message|SendMessage", "Send a message to a person",
         (Parameter("to|recipient|person|contact", "string", "Who gets the message", _of(chores.NAMES)), Parameter("text|message|body|content", "string", "The message", _of(MESSAGES))),
         "Send a message to {0}: {1}|Tell {0} that {1}.|Text {0}: {1}|Please write to {0}: {1}",
         lambda r, v: {"status": "sent"}, "I have sent your message to {0}."),
    Tool("send_email|sendEmail|email", "Send an email",
         (Parameter("to|address|recipient", "string", "Email address", lambda r: f"{r.choice(chores.NAMES).lower()}@example.{r.choice(['com', 'org', 'net'])}"),
          Parameter("subject|title", "string", "Subject of the email", _of(TASKS)), Parameter("body|text|content", "string", "Text of the email", _of(MESSAGES))),
         "Send an email to {0} with the subject {1} and the text {2}.|Email {0}, subject {1}: {2}",
         lambda r, v: {"status": "sent"}, "Your email to {0} is on its way."),
    Tool("play_music|play_song|playMusic|PlaySong", "Play a song", (Parameter("song|title|track|song_name", "string", "Title of the song", _of(SONGS)),),
         "Play {0}.|Please play the song {0}.|I want to hear {0}.|Put on {0}, please.",
         lambda r, v: {"status": "playing"}, "Now playing {0}.", "Play a song.|Which song would you like to hear?"),
    Tool("search|web_search|searchWeb|lookup|find_information", "Search for information", (Parameter("query|topic|q|term", "string", "What to search for", _of(TOPICS)),),
         "Search for {0}.|Find something about {0}.|Look up {0}.|I need information about {0}.|Please search the web for {0}.",
         lambda r, v: {"title": f"All about {v[0]}", "pages": r.randint(1, 90)}, "I found {pages} pages. The first one is called {title}.", "Search for something.|What should I search for?"),
    Tool("translate|translate_text|translation|TranslateText", "Translate a text into another language",
         (Parameter("text|sentence|phrase", "string", "The text to translate", _of(MESSAGES)), Parameter("language|target|to_language|target_language", "string", "Language to translate into", _of(LANGUAGES))),
         'Translate "{0}" into {1}.|How do you say "{0}" in {1}?|What is "{0}" in {1}?',
         lambda r, v: {"translation": r.choice(["...", "la la la", "(translated)"])}, 'In {1}, it is "{translation}".'),
    Tool("add_task|create_todo|add_todo|addTask|remind_me", "Add a task to the list", (Parameter("task|title|item|what", "string", "What to do", _of(TASKS)),),
         "Remind me to {0}.|Add {0} to my list.|I have to {0}, please write it down.|New task: {0}",
         lambda r, v: {"id": r.randint(1, 400)}, "I have added {0} to your list.", "Add something to my list.|What should I add?"),
    Tool("create_event|add_event|schedule_meeting|AddEvent|createEvent", "Add an event to the calendar",
         (Parameter("title|name|event_name|event", "string", "Name of the event", _of(["lunch", "piano lesson", "team meeting", "birthday party", "dentist", "picnic", "concert", "swimming"])),
          Parameter("date|day|event_date", "string", "Date of the event", _date), Parameter("time|start|event_time", "string", "Start time", _time)),
         "Add {0} on {1} at {2} to my calendar.|Schedule {0} for {1}, {2}.|Please put {0} in my calendar on {1} at {2}.",
         lambda r, v: {"status": "saved"}, "{0} is in your calendar on {1} at {2}."),
    Tool("turn_on_light|switch_light|set_light|lightSwitch", "Switch the light in a room on or off",
         (Parameter("room|where|location", "string", "Which room", _of(ROOMS)), Parameter("state|status|mode", "string", "On or off", _of(["on", "off"]), ("on", "off"))),
         "Turn {1} the light in the {0}.|Please switch the {0} light {1}.|Light in the {0} {1}.",
         lambda r, v: {"status": "done"}, "The light in the {0} is now {1}."),
    Tool("set_temperature|thermostat|setTemperature", "Set the temperature of a room",
         (Parameter("room|zone", "string", "Which room", _of(ROOMS)), Parameter("degrees|temperature|value", "integer", "Temperature in degrees", lambda r: r.randint(15, 27))),
         "Set the {0} to {1} degrees.|Make it {1} degrees in the {0}.|I want {1} degrees in the {0}.",
         lambda r, v: {"status": "done"}, "The {0} will soon be at {1} degrees."),
    Tool("convert_currency|exchange|currency_convert|convertMoney", "Convert an amount of money",
         (Parameter("amount|value|sum", "number", "Amount of money", lambda r: r.choice([r.randint(1, 900), r.randint(1, 900) + 0.5])), Parameter("from|source|from_currency", "string", "Currency to convert from", _of(["USD", "EUR", "GBP", "JPY", "CHF"])),
          Parameter("to|target|to_currency", "string", "Currency to convert to", _of(["CAD", "AUD", "INR", "SEK", "MXN"]))),
         "Convert {0} {1} to {2}.|How much is {0} {1} in {2}?|{0} {1} in {2}?",
         lambda r, v: {"result": round(r.uniform(1, 2000), 2)}, "{0} {1} is {result} {2}."),
    Tool("find_restaurant|search_restaurants|findRestaurants|restaurants", "Find a restaurant in a city",
         (CITY, Parameter("cuisine|food|kind|type", "string", "Kind of food", _of(CUISINES))),
         "Find {1} food in {0}.|I want to eat {1} food in {0}.|Is there a good {1} restaurant in {0}?",
         lambda r, v: {"name": r.choice(["Golden Spoon", "Blue Door", "Old Town Grill", "Green Garden", "Little Kitchen"]), "rating": r.randint(3, 5)},
         "{name} in {0} serves {1} food and has a rating of {rating}."),
    Tool("book_table|reserve_table|reservation|BookTable", "Reserve a table at a restaurant",
         (Parameter("restaurant|name|restaurant_name", "string", "Name of the restaurant", _of(["Golden Spoon", "Blue Door", "Old Town Grill", "Green Garden", "Little Kitchen"])),
          Parameter("people|party_size|guests|seats", "integer", "Number of people", lambda r: r.randint(1, 9)), Parameter("time|at|hour", "string", "Time", _time)),
         "Book a table for {1} at {0} at {2}.|Reserve {0} for {1} people at {2}.|We are {1} people and want to eat at {0} at {2}.",
         lambda r, v: {"status": "confirmed"}, "Your table for {1} at {0} is booked for {2}."),
    Tool("find_trains|search_trains|get_trains|TrainSearch", "Find trains between two cities",
         (Parameter("from|origin|start|from_city", "string", "City where the trip starts", _of(CITIES[::2])), Parameter("to|destination|to_city", "string", "City where the trip ends", _of(CITIES[1::2])),
          Parameter("date|day|travel_date", "string", "Date of the trip", _date)),
         "Find a train from {0} to {1} on {2}.|I need to go from {0} to {1} on {2}.|Trains from {0} to {1}, {2}, please.",
         lambda r, v: {"departure": _time(r), "price": r.randint(9, 150)}, "There is a train from {0} to {1} at {departure}. It costs {price} dollars."),
    Tool("roll_dice|roll|throw_dice|rollDice", "Roll dice",
         (Parameter("sides|faces", "integer", "Number of sides", _of([4, 6, 8, 10, 12, 20])), Parameter("count|number|dice", "integer", "How many dice", lambda r: r.randint(1, 5))),
         "Roll {1} dice with {0} sides.|Throw {1} dice that have {0} sides.",
         lambda r, v: {"total": r.randint(v[1], v[0] * v[1])}, "You rolled {total}."),
    Tool("get_stock_price|stock_price|quote|getQuote", "Get the price of a stock", (Parameter("symbol|ticker|stock", "string", "Symbol of the stock", _of(["AAPL", "GOOG", "MSFT", "NVDA", "AMZN", "TSLA", "IBM", "ORCL", "INTC", "AMD"])),),
         "What is the price of {0}?|How is {0} doing?|Stock price of {0}, please.",
         lambda r, v: {"price": round(r.uniform(10, 900), 2)}, "{0} is at {price} dollars."),
    Tool("read_file|open_file|readFile|cat", "Read a file", (Parameter("path|file|filename", "string", "Path of the file", lambda r: f"{r.choice(['notes', 'data', 'report', 'list', 'todo', 'recipe'])}{r.choice(['', '1', '2', '_old'])}.{r.choice(['txt', 'md', 'csv', 'json'])}"),),
         "Read the file {0}.|What is in {0}?|Open {0}, please.|Show me {0}.",
         lambda r, v: {"text": r.choice(MESSAGES)}, 'The file {0} says: "{text}"'),
    Tool("get_user|find_user|lookup_user|getUser", "Look up a user by number", (Parameter("id|user_id|number", "integer", "Number of the user", lambda r: r.randint(1, 9999)),),
         "Who is user {0}?|Look up user number {0}.|Find the user with the id {0}.",
         lambda r, v: {"name": r.choice(chores.NAMES), "city": r.choice(CITIES)}, "User {0} is {name} from {city}."),
    Tool("order_food|place_order|orderFood", "Order food",
         (Parameter("item|dish|food", "string", "What to order", _of(words.FOODS)), Parameter("quantity|amount|count", "integer", "How many", lambda r: r.randint(1, 9)), Parameter("delivery|deliver|bring", "boolean", "Whether to deliver it", _of([True, False]))),
         "Order {1} {0}.|I would like {1} {0}, please.|Can I get {1} {0}?",
         lambda r, v: {"order": r.randint(100, 999)}, "I have ordered {1} {0} for you. Your order number is {order}."),
    Tool("get_recipe|find_recipe|recipe|searchRecipe", "Find a recipe", (Parameter("dish|name|meal|food", "string", "What to cook", _of(words.FOODS)),),
         "How do I make {0}?|Find a recipe for {0}.|I want to cook {0}.|Recipe for {0}, please.",
         lambda r, v: {"minutes": r.randint(10, 90), "difficulty": r.choice(["easy", "hard"])}, "I found an {difficulty} recipe for {0}. It takes {minutes} minutes.", "I want to cook something.|What would you like to cook?"),
]  # fmt: skip
SYSTEMS = ["", "", "", "You are a helpful assistant.", "You are a friendly assistant with tools.", "Use the tools when they help."]


@dataclass(frozen=True)
class Offered:
    """A tool as one conversation knows it: these names, this order."""

    tool: Tool
    name: str
    parameters: tuple[str, ...]
    schema: dict


def offer(tool: Tool, random: Random) -> Offered:
    name = random.choice(tool.names.split("|"))
    called = tuple(random.choice(p.names.split("|")) for p in tool.parameters)
    shown = list(zip(called, tool.parameters, strict=True))
    random.shuffle(shown)
    properties = {n: {"type": p.type, "description": p.about} | ({"enum": list(p.enum)} if p.enum else {}) for n, p in shown}
    about = tool.about + random.choice(["", "", "."])
    required = [n for n, p in zip(called, tool.parameters, strict=True) if p.type != "boolean"]
    schema = {"name": name, "description": about, "parameters": {"type": "object", "properties": properties, "required": required}}
    return Offered(tool, name, called, {"type": "function", "function": schema})


def call(name: str, arguments: dict, number: int) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}]}


def _turn(offered: Offered, random: Random, number: int) -> list[dict]:
    tool = offered.tool
    values = [p.draw(random) for p in tool.parameters]
    ask = random.choice(tool.asks.split("|")).format(*values)
    start = [{"role": "user", "content": ask}]
    if tool.missing and random.random() < 0.15:
        vague, back = tool.missing.split("|")
        start = [{"role": "user", "content": vague}, {"role": "assistant", "content": back}, {"role": "user", "content": f"{values[0]}"}]
    arguments = {n: v for n, p, v in zip(offered.parameters, tool.parameters, values, strict=True) if p.type != "boolean"}
    result = tool.result(random, values)
    return [
        *start,
        call(offered.name, arguments, number),
        {"role": "tool", "tool_call_id": f"call_{number}", "content": json.dumps(result)},
        {"role": "assistant", "content": tool.says.format(*values, **result).replace("an hard", "a hard")},
    ]


def make(random: Random) -> tuple[list[dict], list[dict]]:
    """(messages, tools): one to three turns over one to five tools; some turns need no tool."""
    offered = [offer(tool, random) for tool in random.sample(TOOLS, random.choice([1, 1, 2, 2, 3, 4, 5]))]
    offered = list({o.name: o for o in offered}.values())
    system = random.choice(SYSTEMS)
    messages = [{"role": "system", "content": system}] if system else []
    for number in range(1, random.choice([1, 1, 2, 3]) + 1):
        draw = random.random()
        if draw < 0.82:
            messages += _turn(random.choice(offered), random, number)
        elif draw < 0.95:
            messages += chores.make(random)
        else:
            story = stories.tell(random)
            messages += chores.chat(stories.ask(story, random), story.text)
    return messages, [o.schema for o in offered]
