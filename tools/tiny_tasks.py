"""What the tiny models learn: small tasks in Gemma 4's chat format, made without end from a random generator.

Owns the texts, which of them are held back, and what a right answer is. A text is held back when a hash of its essence
(the unordered pair of a sum, the list to copy, the passage and question, the call, the record) says so: one in ten. The
trainer only ever draws the others, the scores only these, so no seed can mix them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from zlib import crc32

from tiny_words import (
    ANIMALS,
    CITIES,
    CODAS,
    COLOURS,
    DAYS,
    FILLERS,
    FOODS,
    JOBS,
    LANGUAGES,
    NAMES,
    ONSETS,
    PLACES,
    SKIES,
    SYSTEMS,
    TALK,
    THINGS,
    VOWELS,
)

from gemma4q.text.chat import render
from gemma4q.text.segments import CALL, CALL_END, CHANNEL, CHANNEL_END, QUOTE, RESPONSE, TURN_END

HELD_BACK = 10  # one text in so many


@dataclass(frozen=True)
class Example:
    """A conversation up to the model's turn, and that turn: `thought` is written where `thinking` is on.

    `essence` decides whether it is held back; `fact` is the part of the prompt that the
    answer needs, where one is; `call` the function and arguments that the answer spells, where it is a call.
    """

    task: str
    messages: tuple[dict, ...]
    answer: str
    essence: str
    thought: str = ""
    tools: tuple[dict, ...] = ()
    thinking: bool = False
    fact: str = ""
    call: tuple[str, dict] | None = None

    def prompt(self) -> str:
        """The text before the model's turn, control tokens spelled out."""
        segments = render(self.messages, self.tools, flavour="small", thinking=self.thinking)
        return "".join(s.text for s in segments)

    def turn(self) -> str:
        """What the model is to write, to its last token."""
        thought = f"{CHANNEL}thought\n{self.thought}\n{CHANNEL_END}" if self.thinking and self.thought else ""
        if thought and self.messages[-1]["role"] == "tool":  # the prompt has opened the thought
            thought = thought.removeprefix(f"{CHANNEL}thought\n")
        return thought + self.answer + (RESPONSE if self.call else TURN_END)


def held_back(essence: str) -> bool:
    return crc32(essence.encode()) % HELD_BACK == 0


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def model(text: str) -> dict:
    return {"role": "assistant", "content": text}


def word(r: Random) -> str:
    """A word that is in no list."""
    return "".join(r.choice(ONSETS) + r.choice(VOWELS) + r.choice(CODAS) for _ in range(r.choice((1, 2, 2))))


def name(r: Random) -> str:
    return r.choice(NAMES) if r.random() < 0.7 else word(r).capitalize()


def city(r: Random) -> str:
    return r.choice(CITIES) if r.random() < 0.7 else word(r).capitalize()


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# -- Sums -------------------------------------------------------------------------------------------------------------

SUMS = (
    "What is {} + {}?", "{} + {}", "{} + {} = ?", "Add {} and {}.", "How much is {} plus {}?", "What is {} plus {}?",
    "{}+{}", "Please add {} and {}.", "What is the sum of {} and {}?",
)  # fmt: skip


def carried(a: int, b: int) -> str:
    """The sum digit by digit, carries written out: `7 + 8 = 15, carry 1. 2 + 5 + 1 = 8.`"""
    ones = a % 10 + b % 10
    steps = [f"{a % 10} + {b % 10} = {ones}" + (", carry 1." if ones > 9 else ", carry 0.")]
    steps.append(f"{a // 10} + {b // 10} + {ones // 10} = {a // 10 + b // 10 + ones // 10}.")
    return " ".join(steps)


def sums(r: Random) -> Example:
    a, b = r.randrange(100), r.randrange(100)
    essence = f"sum {min(a, b)} {max(a, b)}"
    return Example("sums", (user(r.choice(SUMS).format(a, b)),), str(a + b), essence, carried(a, b))


# -- Copying and reversing --------------------------------------------------------------------------------------------

COPIES = ("Repeat: {}", "Copy this list: {}", "Say this again: {}", "Repeat after me: {}", "Write this down: {}")
REVERSALS = ("Say it backwards: {}", "Reverse this list: {}", "Write this list in reverse order: {}")


def item(r: Random) -> str:
    kind = r.random()
    if kind < 0.55:
        return r.choice(r.choice((THINGS, ANIMALS, FOODS, COLOURS, NAMES, CITIES)))
    return str(r.randrange(r.choice((10, 100, 1000)))) if kind < 0.75 else word(r)


def copy(r: Random) -> Example:
    items = ", ".join(item(r) for _ in range(r.randint(3, 12)))
    thought = "I repeat the list."
    return Example("copy", (user(r.choice(COPIES).format(items)),), items, f"copy {items}", thought)


def reverse(r: Random) -> Example:
    items = [item(r) for _ in range(r.randint(3, 8))]
    forth, back = ", ".join(items), ", ".join(items[::-1])
    thought = "I start with the last item."
    return Example("reverse", (user(r.choice(REVERSALS).format(forth)),), back, f"reverse {forth}", thought)


# -- Look-up ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    sentence: str
    question: str
    answer: str


def fact(r: Random, who: str, kind: int) -> Fact:
    """Something about someone; `kind` says what."""
    where, what = city(r), f"{r.choice(COLOURS)} {r.choice(THINGS)}"
    what = ("an " if what[0] in "aeiou" else "a ") + what
    age, code = str(r.randint(2, 99)), str(r.randint(1000, 9999))
    job, food, place, thing = r.choice(JOBS), r.choice(FOODS), r.choice(PLACES), r.choice(THINGS)
    return (
        Fact(f"{who} lives in {where}.", f"Where does {who} live?", where),
        Fact(f"{who} has {what}.", f"What does {who} have?", what),
        Fact(f"{who} is {age} years old.", f"How old is {who}?", age),
        Fact(f"The code of {who} is {code}.", f"What is the code of {who}?", code),
        Fact(f"{who} works as a {job}.", f"What is the job of {who}?", job),
        Fact(f"{who} likes {food}.", f"What does {who} like?", food),
        Fact(f"The {thing} of {who} is in the {place}.", f"Where is the {thing} of {who}?", f"in the {place}"),
    )[kind]


def passage(r: Random, facts: int, fillers: int) -> tuple[list[str], list[Fact]]:
    """Sentences in random order, no two of which answer the same question; and the facts among them."""
    people = list(dict.fromkeys(name(r) for _ in range(facts + 2)))
    asked = {(r.choice(people), r.randrange(7)) for _ in range(facts)}
    found = [fact(r, *pair) for pair in sorted(asked)]
    r.shuffle(found)
    sentences = [f.sentence for f in found] + [r.choice(FILLERS) for _ in range(fillers)]
    r.shuffle(sentences)
    return sentences, found


def lookup(r: Random, facts: tuple[int, int] = (1, 12), place: float | None = None) -> Example:
    """A question about a passage, in one message or after it; `place` is where the fact stands, 0 first, 1 last."""
    sentences, found = passage(r, r.randint(*facts), r.choice((0, 0, 1, 3)))
    wanted = r.choice(found)
    if place is not None:
        sentences.remove(wanted.sentence)
        sentences.insert(round(place * len(sentences)), wanted.sentence)
    text = " ".join(sentences)
    form = r.randrange(4)
    if form == 0:
        messages = (user(f"{text} {wanted.question}"),)
    elif form == 1:
        messages = (user(f"{text}\n\n{wanted.question}"),)
    elif form == 2:
        messages = (user(f"Read this: {text}\n{wanted.question}"),)
    else:
        messages = (user(f"Remember this: {text}"), model("OK."), user(wanted.question))
    essence = f"lookup {text} {wanted.question}"
    return Example("lookup", messages, wanted.answer, essence, wanted.sentence, fact=wanted.sentence)


def several_lookups(r: Random) -> Example:
    """Question after question about one passage: all turns but the last are history."""
    sentences, found = passage(r, r.randint(4, 12), r.choice((0, 1, 2)))
    wanted = r.sample(found, min(len(found), r.randint(2, 5)))
    text = " ".join(sentences)
    messages = [user(f"{text} {wanted[0].question}")]
    for before, after in pairwise(wanted):
        messages += [model(before.answer), user(after.question)]
    essence = f"lookup {text} {wanted[-1].question}"
    return Example("lookup", tuple(messages), wanted[-1].answer, essence, wanted[-1].sentence, fact=wanted[-1].sentence)


# -- Tools ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A function with a few ways to ask for it; `draw` makes arguments by parameter name."""

    name: str
    purpose: str
    parameters: dict[str, tuple[str, str]]  # name: (type, description)
    asks: tuple[str, ...]
    draw: dict[str, Callable[[Random], object]]
    result: Callable[[Random], dict]
    says: str

    def declaration(self) -> dict:
        properties = {n: {"type": t, "description": d} for n, (t, d) in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": sorted(self.parameters)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.purpose, "parameters": schema},
        }


def phrase(r: Random) -> str:
    return r.choice((
        f"I am in {city(r)}", f"see you on {r.choice(DAYS)}", f"bring the {r.choice(THINGS)}", f"buy {r.choice(FOODS)}",
        f"the {r.choice(THINGS)} is {r.choice(COLOURS)}", f"call {name(r)}", f"feed the {r.choice(ANIMALS)}",
    ))  # fmt: skip


def number(low: int, high: int) -> Callable[[Random], int]:
    return lambda r: r.randint(low, high)


def one_of(words: list[str]) -> Callable[[Random], str]:
    return lambda r: r.choice(words)


def done(r: Random) -> dict:
    return {"status": "done"}


TOOLS = (
    Tool("get_weather", "Weather in a city", {"city": ("string", "City")},
         ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}?"), {"city": city},
         lambda r: {"sky": r.choice(SKIES), "temperature": r.randint(-9, 39)},
         "It is {sky} in {city}, {temperature} degrees."),
    Tool("get_time", "Time in a city", {"city": ("string", "City")},
         ("What time is it in {city}?", "Time in {city}?", "Tell me the time in {city}."), {"city": city},
         lambda r: {"time": f"{r.randrange(24)}:{r.randrange(60):02}"}, "It is {time} in {city}."),
    Tool("set_timer", "Starts a timer", {"minutes": ("integer", "Minutes")},
         ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.", "Timer, {minutes} minutes!"),
         {"minutes": number(1, 99)}, done, "The timer is set for {minutes} minutes."),
    Tool("send_message", "Sends a message", {"text": ("string", "Text"), "to": ("string", "Person")},
         ("Tell {to} this: {text}", "Send a message to {to}: {text}", "Write to {to}: {text}"),
         {"text": phrase, "to": name}, done, "I have told {to}."),
    Tool("translate", "Translates a text", {"language": ("string", "Language"), "text": ("string", "Text")},
         ("Translate into {language}: {text}", "How do you say this in {language}: {text}"),
         {"language": one_of(LANGUAGES), "text": phrase}, done, "Done."),
    Tool("find_recipe", "Finds a recipe", {"food": ("string", "Food")},
         ("Find a recipe for {food}.", "How do I cook {food}?", "I want to make {food}."), {"food": one_of(FOODS)},
         lambda r: {"minutes": r.randint(5, 90)}, "I found a recipe for {food}. It takes {minutes} minutes."),
    Tool("buy", "Buys things", {"count": ("integer", "How many"), "item": ("string", "Thing")},
         ("Buy {count} of this: {item}", "Order {count} times {item}.", "I need {count} times {item}."),
         {"count": number(2, 60), "item": lambda r: f"{r.choice(COLOURS)} {r.choice(THINGS)}"}, done,
         "I have ordered {count} times {item}."),
    Tool("book_table", "Books a table", {"day": ("string", "Day"), "people": ("integer", "Guests")},
         ("Book a table for {people} on {day}.", "On {day} we need a table for {people}."),
         {"day": one_of(DAYS), "people": number(2, 20)}, done, "The table for {people} on {day} is booked."),
    Tool("call", "Calls a person", {"person": ("string", "Person")},
         ("Call {person}.", "Please phone {person}.", "I want to talk to {person}."), {"person": name}, done,
         "I am calling {person}."),
    Tool("add_note", "Saves a note", {"note": ("string", "Note")},
         ("Note this: {note}", "Make a note: {note}", "Write down: {note}"), {"note": phrase}, done,
         "I have noted it."),
    Tool("find_book", "Finds books", {"author": ("string", "Author"), "topic": ("string", "Topic")},
         ("Find a book by {author} about {topic}.", "Is there a book about {topic} by {author}?"),
         {"author": name, "topic": one_of(ANIMALS + THINGS)},
         lambda r: {"pages": r.randint(40, 900)}, "Yes: a book by {author} about {topic}, {pages} pages."),
    Tool("light", "Switches a lamp", {"on": ("boolean", "On or off"), "room": ("string", "Room")},
         ("Switch the light in the {room} {on}.", "Light in the {room} {on}!"),
         {"on": lambda r: r.random() < 0.5, "room": one_of(PLACES)}, done, "The light in the {room} is {on}."),
)  # fmt: skip


def shown(values: dict) -> dict:
    return {n: {True: "on", False: "off"}.get(v, v) if isinstance(v, bool) else v for n, v in values.items()}


def spelled(tool: Tool, values: dict) -> str:
    """A call as the model writes it."""

    def one(value) -> str:
        return f"{QUOTE}{value}{QUOTE}" if isinstance(value, str) else json.dumps(value)

    fields = ",".join(f"{n}:{one(values[n])}" for n in sorted(values))
    return f"{CALL}call:{tool.name}{{{fields}}}{CALL_END}"


def tools(r: Random) -> Example:
    offered = r.sample(TOOLS, r.choice((1, 2, 2, 3)))
    tool = r.choice(offered)
    values = {n: tool.draw[n](r) for n in tool.parameters}
    ask = r.choice(tool.asks).format(**shown(values))
    messages = (user(ask),)
    if r.random() < 0.15:
        messages = (*small_talk(r), *messages)
    declared = tuple(t.declaration() for t in offered)
    thought = f"I need {tool.name}."
    essence = f"tools {tool.name} {values}"
    example = Example("tools", messages, spelled(tool, values), essence, thought, declared, call=(tool.name, values))
    return example if r.random() < 0.7 else answered(r, example, tool, values)


def answered(r: Random, example: Example, tool: Tool, values: dict) -> Example:
    """The same after the tool has returned."""
    result = tool.result(r)
    call = {"id": "1", "type": "function", "function": {"name": tool.name, "arguments": values}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    returned = {"role": "tool", "tool_call_id": "1", "name": tool.name, "content": json.dumps(result)}
    text = tool.says.format(**shown(values), **result)
    return replace(example, task="answers", messages=(*example.messages, asked, returned), answer=text, call=None,
                   thought="I have the result.")  # fmt: skip


def no_tool(r: Random) -> Example:
    """Tools are there, but small talk needs none."""
    declared = tuple(t.declaration() for t in r.sample(TOOLS, r.choice((1, 2))))
    return replace(talk(r), tools=declared)


# -- JSON -------------------------------------------------------------------------------------------------------------

JSON_ASKS = (
    "Write JSON with {keys}: {text}", "Make JSON with the keys {keys}. {text}", "{text} Give me {keys} as JSON.",
    "Extract {keys} as JSON: {text}",
)  # fmt: skip


def extraction(r: Random) -> Example:
    who, record = name(r), {}
    record = {"name": who, "age": r.randint(2, 99), "city": city(r), "job": r.choice(JOBS), "food": r.choice(FOODS),
              "code": r.randint(100, 9999)}  # fmt: skip
    forms = {
        "age": (f"{who} is {record['age']} years old.", f"The age of {who} is {record['age']}."),
        "city": (f"{who} lives in {record['city']}.", f"The home of {who} is {record['city']}."),
        "job": (f"{who} works as a {record['job']}.", f"{who} is a {record['job']}."),
        "food": (f"{who} likes {record['food']}.", f"{who} loves {record['food']}."),
        "code": (f"The code of {who} is {record['code']}.",),
    }
    told = r.sample(sorted(forms), r.randint(2, 4))
    keys = ["name"] * (r.random() < 0.8) + r.sample(told, r.randint(1, len(told)))
    r.shuffle(keys)
    text = " ".join(r.choice(forms[key]) for key in told)
    ask = r.choice(JSON_ASKS).format(keys=listed(keys), text=text)
    answer = json.dumps({key: record[key] for key in keys}, ensure_ascii=False)
    return Example("json", (user(ask),), answer, f"json {text} {keys}", f"The keys are {listed(keys)}.")


# -- Talk and stories -------------------------------------------------------------------------------------------------


def small_talk(r: Random) -> tuple[dict, dict]:
    asks, answer = r.choice(TALK)
    return user(r.choice(asks)), model(answer)


def talk(r: Random) -> Example:
    asks, answer = r.choice(TALK)
    return Example("talk", (user(r.choice(asks)),), answer, "talk", "I answer politely.")


def story(r: Random) -> Example:
    """A story about an animal: what it finds and meets is drawn, what follows from it is not."""
    hero, other = r.sample(ANIMALS, 2)
    thing, colour, place, food = r.choice(THINGS), r.choice(COLOURS), r.choice(PLACES), r.choice(FOODS)
    ask = r.choice(("Tell me a story about a {}.", "A story about a {}, please.", "Write a tiny story about a {}."))
    text = (
        f"Once there was a {hero} who lived in a {place}. One day the {hero} found a {colour} {thing}. "
        f'"Whose {thing} is this?" asked the {hero}. "It is mine," said a {other}, "but you may keep it." '
        f"So the {hero} gave the {other} some {food}, and they were friends from that day on."
    )
    return Example("story", (user(ask.format(hero)),), text, f"story {text}", f"A story about a {hero}.")


# -- All of them ------------------------------------------------------------------------------------------------------

TASKS: dict[str, Callable[[Random], Example]] = {
    "copy": copy, "reverse": reverse, "sums": sums, "lookup": lookup, "several_lookups": several_lookups,
    "tools": tools, "no_tool": no_tool, "json": extraction, "talk": talk, "story": story,
}  # fmt: skip
NEVER_HELD_BACK = ("talk", "story", "no_tool")
THINKS = {"sums": 0.9, "tools": 0.35, "answers": 0.35}  # how often thinking is on; else in LESS_OFTEN
LESS_OFTEN = 0.35


def draw(r: Random, task: str, held: bool = False) -> Example:
    """An example of a task, of those held back or of the others, in one of the ways a user may meet it."""
    while True:
        example = TASKS[task](r)
        if task in NEVER_HELD_BACK or held_back(example.essence) == held:
            break
    example = replace(example, thinking=r.random() < THINKS.get(example.task, LESS_OFTEN))
    if r.random() < 0.25:
        example = replace(example, messages=({"role": "system", "content": r.choice(SYSTEMS)}, *example.messages))
    return example
