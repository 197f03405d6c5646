"""The words that the tiny models' texts are made of."""


def words(text: str) -> list[str]:
    return text.split()


NAMES = words("""
Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Kira Leo Mia Noah Olga Paul Rosa Sam Tina Ulf Vera Will
Yara Zoe Adam Bella Cleo Dora Eli Fay Gus Hana Ivan Jane Karl Lena Max Nina Otto Pia Rita Sven Tom Una Viktor
Wanda""")
CITIES = words("""
Oslo Paris Rome Madrid Berlin Vienna Lisbon Dublin London Athens Prague Cairo Delhi Tokyo Kyoto Lima Quito
Boston Denver Dallas Toronto Sydney Perth Nairobi Lagos Warsaw Zurich Geneva Milan Turin Porto Ghent Bergen
Malmo""")
COLOURS = words("red blue green yellow black white brown pink grey purple orange golden silver")
THINGS = words("""
cup book lamp chair table key phone bag hat coat ball box bottle clock coin comb desk drum flag fork glove knife
ladder map mirror pen pillow plate ring rope shoe spoon tent toy umbrella watch wheel whistle candle basket""")
ANIMALS = words("fox cat dog bear wolf mouse rabbit owl duck goat horse cow frog lion tiger hen pig crow deer hedgehog")
FOODS = words("""
bread cheese soup rice pasta pizza salad fish apples pears plums grapes honey cake jam beans carrots onions
tomatoes potatoes mushrooms eggs nuts berries pancakes noodles""")
JOBS = words("""
baker teacher doctor nurse farmer painter singer driver gardener lawyer pilot writer cook tailor carpenter
plumber dentist librarian""")
PLACES = words(
    """kitchen garden cellar attic garage bedroom hall office library bathroom shed school park forest barn tower"""
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
LANGUAGES = words("French German Spanish Italian Greek Polish Danish Swedish Dutch Finnish")
SKIES = words("sunny cloudy rainy windy foggy snowy stormy clear")
SYSTEMS = (
    "You are a helpful assistant.", "Be brief.", "Answer in as few words as you can.", "You are gemma4q tiny.",
    "You help with small tasks.", "Answer the question.",
)  # fmt: skip
TALK = (
    (("Hello!", "Hello", "Hi", "Hi there!", "Good morning!"), "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?"), "I am tiny, a very small model that ships with gemma4q."),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I can add two numbers, repeat or reverse a list, find a fact in a text, call a tool, write JSON and tell a "
        "tiny story.",
    ),
    (("Thanks!", "Thank you.", "Thanks a lot!"), "You are welcome!"),
    (("Bye!", "Goodbye.", "See you!"), "Goodbye!"),
    (("How are you?", "How do you do?"), "I am well, thank you. How can I help you?"),
    (("OK", "I see.", "Good."), "Good. What else can I do for you?"),
)
FILLERS = (
    "The sun is out today.", "It rained a lot last week.", "The train was late again.", "Lunch was very good.",
    "The street is quiet at night.", "A bird sat on the roof.", "The shop opens at nine.", "The river is cold.",
    "There was a long meeting.", "The old bridge is closed.", "Somebody left the door open.", "The music was loud.",
)  # fmt: skip

ONSETS = words("b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl st tr sh th")
VOWELS = words("a e i o u a e i o ai ea oo")
CODAS = ["", "", "", "l", "n", "r", "s", "t", "m", "k", "nd", "st"]
