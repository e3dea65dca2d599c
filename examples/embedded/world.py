"""The templated English texts that the embedded model is pretrained on and that its downstream tasks consist of.

There are three layers: a lexicon, sentences, and one *content* function for each skill. A content function takes a
`random.Random` and returns a text and its outcome, such as `True`, `"sport"` or `3`. `skills.py` (pretraining) and
`tasks.py` (downstream) add the instructions and the labels.

Relational texts (entailment, paraphrase, word in context, comparison, ...) with different outcomes consist of the same
words with the same probability. Counting words therefore gives no information about the outcome.

Random choices are made from lists and tuples, never from sets, so a seed gives the same text in every process.
"""

import itertools
from random import Random


# --- Lexicon ---------------------------------------------------------------------------------------------------------

NAMES = "anna ben carl dora emma finn greta hugo iris jack kate leo mia nick olga paul".split()
CITIES = "london paris rome oslo cairo lima delhi tokyo madrid vienna dublin athens".split()
ANIMALS = "dog cat horse cow sheep fox lion bear duck rabbit wolf goat".split()
COLOURS = "red blue green yellow black white brown pink grey purple".split()
OBJECTS = "books cups hats lamps boxes coats bells clocks chairs baskets mirrors bottles".split()
FOODS = "apple bread cheese rice cake egg banana honey carrot onion melon tea milk".split()
JOBS = "doctor teacher farmer baker driver painter nurse sailor judge tailor king queen".split()
MATERIALS = "gold silver iron wood stone sand glass paper leather cotton steel clay".split()
WEATHER = "sun rain snow wind moon star cloud storm fog thunder frost sky".split()
DIRECTIONS = "north south east west up down inside outside".split()
TREES = "oak pine birch willow maple palm cedar elm".split()
BODY = "arm leg hand foot nose ear mouth knee neck finger".split()
NUMBERS = "zero one two three four five six seven eight nine".split()
DIGITS = list("0123456789")

PRAISE = (
    "good great lovely wonderful excellent charming superb brilliant delightful pleasant fine amazing fantastic fun "
    "perfect splendid"
).split()
BLAME = (
    "bad awful terrible horrible poor dull boring nasty dreadful weak ugly messy broken lousy sloppy shabby"
).split()
CATEGORIES = {
    "animal": ANIMALS,
    "colour": COLOURS,
    "thing": OBJECTS,
    "food": FOODS,
    "job": JOBS,
    "material": MATERIALS,
    "weather": WEATHER,
    "direction": DIRECTIONS,
    "plant": TREES,
    "body": BODY,
    "city": CITIES,
    "name": NAMES,
    "positive": PRAISE,
    "negative": BLAME,
}
WORDS = [word for words in CATEGORIES.values() for word in words]
ASPECTS = {
    "film": "plot cast ending dialogue".split(),
    "hotel": "room staff bed pool".split(),
    "meal": "starter dessert service wine".split(),
    "phone": "screen battery camera sound".split(),
    "novel": "style hero opening language".split(),
}
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

# Topic: its nouns, and its intransitive verbs.
TOPICS = {
    "sport": (
        "team player goal race coach referee stadium trophy".split(),
        "won lost trained scored raced".split(),
    ),
    "food": (
        "chef oven recipe sauce salad butter dinner flour".split(),
        "cooked baked dined ate fried".split(),
    ),
    "music": (
        "band guitar piano choir melody concert violin song".split(),
        "sang drummed hummed danced played".split(),
    ),
    "nature": (
        "forest river flower mountain bird lake leaf deer".split(),
        "grew bloomed swam flew hatched".split(),
    ),
    "money": (
        "price budget tax coin loan profit wallet salary".split(),
        "paid saved traded spent earned".split(),
    ),
    "science": (
        "computer robot laboratory theory sensor magnet atom laser".split(),
        "tested measured computed observed proved".split(),
    ),
}
AMBIGUOUS = {
    "bat": ("sport", "nature"),
    "pitch": ("sport", "music"),
    "record": ("sport", "music"),
    "court": ("sport", "money"),
    "chip": ("food", "science"),
    "stock": ("food", "money"),
    "roll": ("food", "music"),
    "date": ("food", "science"),
    "bass": ("music", "nature"),
    "note": ("music", "money"),
    "scale": ("music", "science"),
    "bank": ("nature", "money"),
    "mouse": ("nature", "science"),
    "seed": ("nature", "sport"),
}

SYNONYMS = (
    ("big", "large"), ("small", "little"), ("quick", "fast"), ("old", "ancient"), ("happy", "glad"), ("angry", "mad"),
    ("clever", "smart"), ("quiet", "silent"), ("strange", "odd"), ("rich", "wealthy"), ("brave", "bold"),
    ("tired", "weary"),
)  # fmt: skip
ACTIONS = (
    ("chased", "hunted"), ("helped", "aided"), ("called", "phoned"), ("followed", "trailed"), ("pushed", "shoved"),
    ("watched", "viewed"), ("scared", "frightened"), ("trusted", "believed"),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("early", "late"), ("open", "shut"), ("full", "empty"), ("near", "far"), ("wet", "dry"),
    ("thick", "thin"), ("soft", "hard"), ("light", "dark"), ("high", "low"),
)  # fmt: skip
SCALES = (
    ("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("richer", "poorer"), ("stronger", "weaker"),
    ("louder", "quieter"),
)  # fmt: skip

# Wordings of a fact about a person `a` and a value `v`. All wordings of a kind have the same meaning.
FACTS = {
    "place": ("{a} is in {v}", "{a} visits {v}", "{a} stays in {v}"),
    "owner": ("{a} has {v}", "{a} owns {v}", "{a} keeps {v}"),
    "job": ("{a} is a {v}", "{a} became a {v}", "{a} works as a {v}"),
    "taste": ("{a} likes {v}", "{a} loves {v}", "{a} enjoys {v}"),
}
FACT_VALUES = {"place": CITIES, "owner": OBJECTS, "job": JOBS, "taste": FOODS}
FACT_QUESTIONS = {  # questions for the value, for the person, and for yes or no
    "place": ("where is {a} ?", "who is in {v} ?", "is {a} in {v} ?"),
    "owner": ("what does {a} have ?", "who has {v} ?", "does {a} have {v} ?"),
    "job": ("what does {a} do ?", "who is a {v} ?", "is {a} a {v} ?"),
    "taste": ("what does {a} like ?", "who likes {v} ?", "does {a} like {v} ?"),
}

# --- Sentences -------------------------------------------------------------------------------------------------------


def coin(rng: Random) -> bool:
    return rng.random() < 0.5


def sentences(*parts: str) -> str:
    return " . ".join(parts) + " ."


def opinion(rng: Random, subject: str, positive: bool) -> str:
    """Return an opinion on `subject`: direct, as the negation of the opposite, or in contrast to it."""
    same, other = (PRAISE, BLAME) if positive else (BLAME, PRAISE)
    good, bad = rng.choice(same), rng.choice(other)
    outright = [
        f"the {subject} was {rng.choice(['', 'very ', 'really '])}{good}",
        f"i found the {subject} {good}",
        f"it had a {good} {subject}",
    ]
    denied = [
        f"the {subject} was {rng.choice(['not', 'never', 'hardly'])} {bad}",
        f"nobody found the {subject} {bad}",
        f"it did not have a {bad} {subject}",
    ]
    against = [
        f"they said the {subject} was {bad} but it was {good}",
        f"the {subject} was {good} and not {bad}",
    ]
    return rng.choice(rng.choices([outright, denied, against], [6, 3, 1])[0])


def aside(rng: Random) -> str:
    """A sentence without an opinion."""
    name, city, day = rng.choice(NAMES), rng.choice(CITIES), rng.choice(DAYS)
    return rng.choice([f"i went there with {name}", f"it was on {day}", f"{name} met me in {city}"])


def topic_sentence(rng: Random, topic: str, noun: str | None = None) -> str:
    """A sentence on `topic`, about `noun` if it is given."""
    nouns, verbs = TOPICS[topic]
    first, second = rng.sample(nouns, 2)
    noun, verb, name = noun or first, rng.choice(verbs), rng.choice(NAMES)
    return rng.choice(
        [
            f"the {noun} and the {second} {verb}",
            f"the {second} {verb} near the {noun}",
            f"{name} {verb} with the {noun}",
            f"{name} talked about the {noun} and the {second}",
            f"there was a {noun} by the {second}",
        ]
    )


def state(rng: Random, kind: str, name: str, value: str) -> str:
    return rng.choice(FACTS[kind]).format(a=name, v=value)


def facts(rng: Random, people: int = 2) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Facts of one kind about some people: the kind, the (name, value) pairs, and the sentences."""
    kind = rng.choice(list(FACTS))
    pairs = list(zip(rng.sample(NAMES, people), rng.sample(FACT_VALUES[kind], people), strict=True))
    return kind, pairs, [state(rng, kind, name, value) for name, value in pairs]


def event(rng: Random, agent: str, patient: str, action: tuple[str, str], where: str) -> str:
    """A sentence about an action, in the active or the passive voice."""
    verb = rng.choice(action)
    core = f"{agent} {verb} {patient}" if coin(rng) else f"{patient} was {verb} by {agent}"
    return f"{core} {where}".strip()


# --- Content, one function per skill: a text (or several) and an outcome ---------------------------------------------


def review(rng: Random) -> tuple[str, bool]:
    """An opinion, with or without a neutral sentence; is it positive?"""
    positive = coin(rng)
    thing = rng.choice(list(ASPECTS))
    parts = [opinion(rng, rng.choice([thing, *ASPECTS[thing]]), positive)]
    if coin(rng):
        parts.insert(rng.randrange(2), aside(rng))
    return sentences(*parts), positive


def aspect_review(rng: Random) -> tuple[str, str, bool]:
    """Opposite opinions on two aspects, and one of the aspects; is the opinion on that aspect positive?"""
    positive = coin(rng)
    asked, other = rng.sample(rng.choice(list(ASPECTS.values())), 2)
    parts = [opinion(rng, asked, positive), opinion(rng, other, not positive)]
    rng.shuffle(parts)
    return sentences(*parts), asked, positive


def several_reviews(rng: Random, number: int = 3) -> tuple[str, int]:
    """Opinions on several things; how many are positive?"""
    verdicts = [True] * rng.randrange(number + 1)
    verdicts += [False] * (number - len(verdicts))
    rng.shuffle(verdicts)
    things = rng.sample(list(ASPECTS), number)
    return sentences(*(opinion(rng, *pair) for pair in zip(things, verdicts, strict=True))), sum(verdicts)


def two_reviews(rng: Random) -> tuple[str, str, bool]:
    """Two opinions on one thing; do they agree?"""
    thing, first, agree = rng.choice(list(ASPECTS)), coin(rng), coin(rng)
    return opinion(rng, thing, first), opinion(rng, thing, first == agree), agree


def topical(rng: Random) -> tuple[str, str]:
    """One or two sentences on a topic; which?"""
    topic = rng.choice(list(TOPICS))
    return sentences(*(topic_sentence(rng, topic) for _ in range(rng.choice([1, 2])))), topic


def two_topics(rng: Random) -> tuple[str, str, bool]:
    """Two sentences; are they on the same topic?"""
    first, second = rng.sample(list(TOPICS), 2)
    same = coin(rng)
    return topic_sentence(rng, first), topic_sentence(rng, first if same else second), same


def word_sense(rng: Random) -> tuple[str, str, str]:
    """A sentence with an ambiguous word, and the word; which topic is its sense from?"""
    word = rng.choice(list(AMBIGUOUS))
    topic = rng.choice(AMBIGUOUS[word])
    return sentences(topic_sentence(rng, topic, word)), word, topic


def word_in_context(rng: Random) -> tuple[str, str, str, bool]:
    """Two sentences that share an ambiguous word, and the word; is the sense the same?"""
    word = rng.choice(list(AMBIGUOUS))
    topics = rng.sample(AMBIGUOUS[word], 2)
    same = coin(rng)
    second = topics[0] if same else topics[1]
    return topic_sentence(rng, topics[0], word), topic_sentence(rng, second, word), word, same


def entailment(rng: Random, people: int = 2) -> tuple[str, str, bool]:
    """Some facts and a statement; does it follow? A wrong statement combines a person with another person's value."""
    true = coin(rng)
    if rng.random() < 0.2:
        (giver, taker), value = rng.sample(NAMES, 2), rng.choice(FACT_VALUES["owner"])
        given = rng.choice([f"{giver} gave {taker} {value}", f"{taker} got {value} from {giver}"])
        return given, state(rng, "owner", taker if true else giver, value), true
    kind, pairs, parts = facts(rng, people)
    (name, value), (_, other) = rng.sample(pairs, 2)
    return " . ".join(parts), state(rng, kind, name, value if true else other), true


def question(rng: Random) -> tuple[str, str, str]:
    """Two facts and a question; what is the answer?"""
    kind, pairs, parts = facts(rng)
    name, value = rng.choice(pairs)
    ask_value, ask_name, _ = FACT_QUESTIONS[kind]
    if coin(rng):
        return sentences(*parts), ask_value.format(a=name), value
    return sentences(*parts), ask_name.format(v=value), name


def yes_no_question(rng: Random) -> tuple[str, str, bool]:
    """Two facts and a question; is the answer yes?"""
    kind, pairs, parts = facts(rng)
    (name, value), (_, other) = rng.sample(pairs, 2)
    true = coin(rng)
    return sentences(*parts), FACT_QUESTIONS[kind][2].format(a=name, v=value if true else other), true


def paraphrase(rng: Random) -> tuple[str, str, bool]:
    """Two sentences; do they mean the same? If not, the roles or the adjectives are swapped."""
    same, action = coin(rng), rng.choice(ACTIONS)
    where = f"near {rng.choice(CITIES)}" if rng.random() < 0.3 else ""
    if coin(rng):
        people = [(None, name) for name in rng.sample(NAMES, 2)]
    else:
        people = list(zip(rng.sample(SYNONYMS, 2), rng.sample(ANIMALS, 2), strict=True))
    if same:
        others = people
    elif coin(rng) or people[0][0] is None:
        others = people[::-1]
    else:
        (look, animal), (other_look, other_animal) = people
        others = [(other_look, animal), (look, other_animal)]
    first, second = (
        event(rng, *(f"the {rng.choice(look)} {who}" if look else who for look, who in pair), action, where)
        for pair in (people, others)
    )
    return first, second, same


def event_question(rng: Random) -> tuple[str, str, str]:
    """A sentence about an action of one on another, and a question for one of them; who?"""
    action = rng.choice(ACTIONS)
    agent, patient = rng.sample(NAMES, 2) if coin(rng) else rng.sample(ANIMALS, 2)
    phrases = (agent, patient) if agent in NAMES else (f"the {agent}", f"the {patient}")
    ask, answer = rng.choice([("who {} the other ?", agent), ("who was {} ?", patient)])
    return sentences(event(rng, *phrases, action, "")), ask.format(rng.choice(action)), answer


def comparison(rng: Random) -> tuple[str, str, bool]:
    """Two comparisons that order three people, and a third; is it true?"""
    more, less = rng.choice(SCALES)
    order = rng.sample(NAMES, 3)
    parts = [compare(rng, more, less, *order[:2]), compare(rng, more, less, *order[1:])]
    rng.shuffle(parts)
    high, low = rng.choice([(0, 1), (1, 2), (0, 2), (0, 2)])
    true = coin(rng)
    pair = (order[high], order[low]) if true else (order[low], order[high])
    return sentences(*parts), compare(rng, more, less, *pair), true


def compare(rng: Random, more: str, less: str, high: str, low: str) -> str:
    return f"{high} is {more} than {low}" if coin(rng) else f"{low} is {less} than {high}"


def extreme(rng: Random) -> tuple[str, str, str]:
    """Comparisons that order two or three people, and a question for the first or the last; who?"""
    more, less = rng.choice(SCALES)
    order = rng.sample(NAMES, rng.choice([2, 3]))
    parts = [compare(rng, more, less, *pair) for pair in itertools.pairwise(order)]
    rng.shuffle(parts)
    word, answer = (more, order[0]) if coin(rng) else (less, order[-1])
    return sentences(*parts), f"who is {word} ?", answer


def amounts(rng: Random) -> tuple[str, str, str]:
    """Two people with different numbers of a thing; who has more, or less?"""
    names, counts, food = rng.sample(NAMES, 2), rng.sample(range(10), 2), rng.choice(FOODS)
    parts = [f"{name} has {NUMBERS[count]} {food}" for name, count in zip(names, counts, strict=True)]
    most = counts.index(max(counts))
    more = coin(rng)
    return sentences(*parts), f"who has {'more' if more else 'less'} ?", names[most if more else 1 - most]


def word_list(rng: Random, low: int = 3, high: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def category_list(rng: Random, most: int = 4) -> tuple[str, str, int]:
    """A list with words of two categories, and one of the two; how many of its words are in the list?"""
    category, other = rng.sample(list(CATEGORIES), 2)
    number = rng.randint(1, most)
    words = rng.sample(CATEGORIES[category], number) + rng.sample(CATEGORIES[other], rng.randint(1, 4))
    rng.shuffle(words)
    return " ".join(words), category, number


def same_words(rng: Random) -> tuple[str, str, bool]:
    """Two lists; do they have the same words, in any order?"""
    words = word_list(rng, 2, 4)
    other = rng.sample(words, len(words))
    same = coin(rng)
    if not same:
        other[rng.randrange(len(other))] = rng.choice([word for word in WORDS if word not in words])
    return " ".join(words), " ".join(other), same


def digits(rng: Random) -> tuple[str, bool]:
    """A few digits; are they ascending? If not, two of them are swapped."""
    ordered = sorted(rng.sample(DIGITS, rng.randint(3, 4)))
    true = coin(rng)
    if not true:
        i, j = rng.sample(range(len(ordered)), 2)
        ordered[i], ordered[j] = ordered[j], ordered[i]
    return " ".join(ordered), true
