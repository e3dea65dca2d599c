"""The pretraining mixture: all skills, with instructions in many wordings and with many different labels.

A *judgement* is a classification skill. It is answered with usual labels (`positive`, `yes`, `true`, ...) or with any
words of `LABELS`, which the instruction names: "positive cups , negative dog". The model thus learns to read its
labels from the encoder's input, where a soft prompt can later define new ones.

The words of `HELD_OUT_LABELS` occur as ordinary words (they are copied, sorted and so on), but never as labels. The
downstream tasks use only these words as labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from embedded import world
from embedded.world import CATEGORIES, DIGITS, NAMES, NUMBERS, OPPOSITES, SYNONYMS, WORDS, coin


HELD_OUT_LABELS = (
    "sun rain north south east west gold silver tea milk stone sand oak pine moon star cloud storm king queen iron "
    "wood paper glass cotton leather"
).split()
LABELS = [word for word in WORDS if word not in (*HELD_OUT_LABELS, *NAMES, *world.PRAISE, *world.BLAME)]

YES_NO = (("yes", "no"), ("true", "false"), ("right", "wrong"))


@dataclass(frozen=True)
class Judgement:
    """A classification skill.

    Args:
        make (`Callable`): Takes a `random.Random` and returns a text and its outcome.
        questions (`Sequence[str]`): Wordings of the instruction.
        outcomes (`Sequence`): All outcomes, in the order of the labels.
        phrases (`Sequence[str]`): The names of the outcomes in an instruction that names labels.
        labels (`Sequence[Sequence[str]]`): Usual labels, one sequence for each verbalizer.
    """

    make: Callable[[Random], tuple[str, object]]
    questions: Sequence[str]
    outcomes: Sequence = (True, False)
    phrases: Sequence[str] = ("yes", "no")
    labels: Sequence[Sequence[str]] = YES_NO

    def __call__(self, rng: Random) -> tuple[str, str]:
        text, outcome = self.make(rng)
        ask = rng.choice(self.questions)
        style = rng.random()
        if style < 0.4:  # the first verbalizer is the default, and the instruction does not name its labels
            return instruct(rng, ask, text), self.labels[0][self.outcomes.index(outcome)]
        labels = rng.choice(self.labels) if style < 0.5 else rng.sample(LABELS, len(self.outcomes))
        shown = list(range(len(self.outcomes)))
        if len(shown) > 4:  # the correct one and three others: all of them would be too long
            right = self.outcomes.index(outcome)
            shown = [right, *rng.sample([i for i in shown if i != right], 3)]
            rng.shuffle(shown)
        answer = labels[self.outcomes.index(outcome)]
        if len(self.outcomes) == 2 and coin(rng):  # without phrases, in the order of the outcomes
            return instruct(rng, f"{ask} {labels[0]} or {labels[1]} ?", text), answer
        rng.shuffle(shown)
        rules = " , ".join(f"{self.phrases[i]} {labels[i]}" for i in shown)
        return instruct(rng, f"{ask} {rules} .", text), answer


def instruct(rng: Random, instruction: str, text: str) -> str:
    """Put the instruction before or after the text."""
    return f"{instruction} {text}" if rng.random() < 0.75 else f"{text} {instruction}"


def joined(make: Callable[[Random], tuple]) -> Callable[[Random], tuple[str, object]]:
    """Join the texts of a content function into one text, with a separator between them."""

    def join(rng: Random) -> tuple[str, object]:
        *parts, answer = make(rng)
        return rng.choice([" | ", " ; ", " so "]).join(part.removesuffix(" .") for part in parts), answer

    return join


def _word_in_context(rng: Random) -> tuple[str, str, str, bool]:
    first, second, word, same = world.word_in_context(rng)
    return (first, second, same) if coin(rng) else (first, second, word, same)


def _member(rng: Random) -> tuple[str, str, bool]:
    words = world.word_list(rng)
    true = coin(rng)
    return " ".join(words), rng.choice(words if true else [word for word in WORDS if word not in words]), true


def _word_sense(rng: Random) -> tuple[str, str]:
    text, word, topic = world.word_sense(rng)
    return f"{word} : {text}", topic


TOPIC_NAMES = list(world.TOPICS)
JUDGEMENTS = {
    "sentiment": Judgement(
        world.review,
        ("is the review positive or negative ?", "what is the sentiment ?", "sentiment :", "how does it sound ?"),
        phrases=("positive", "negative"),
        labels=(("positive", "negative"), ("good", "bad"), ("happy", "sad")),
    ),
    "aspect": Judgement(
        joined(world.aspect_review),
        ("what about this part ?", "sentiment of the part :", "how was the part named last ?"),
        phrases=("positive", "negative"),
        labels=(("positive", "negative"), ("good", "bad"), ("happy", "sad")),
    ),
    "topic": Judgement(
        world.topical,
        ("what is the topic ?", "topic :", "what is this about ?"),
        outcomes=TOPIC_NAMES,
        phrases=TOPIC_NAMES,
        labels=(TOPIC_NAMES,),
    ),
    "word sense": Judgement(
        _word_sense,
        ("which field is the word from ?", "field of the word :"),
        outcomes=TOPIC_NAMES,
        phrases=TOPIC_NAMES,
        labels=(TOPIC_NAMES,),
    ),
    "same topic": Judgement(joined(world.two_topics), ("same topic ?", "are they about the same ?", "one topic ?")),
    "word in context": Judgement(
        joined(_word_in_context), ("same sense ?", "does the word mean the same ?", "is it one meaning ?")
    ),
    "entailment": Judgement(
        joined(world.entailment), ("does it follow ?", "is the last one true ?", "entailment :", "can we say so ?")
    ),
    "yes or no": Judgement(
        joined(world.yes_no_question), ("answer :", "reply to the question :", "what is the answer ?")
    ),
    "paraphrase": Judgement(
        joined(world.paraphrase),
        ("do they say the same ?", "same meaning ?", "paraphrase :", "is it the same story ?"),
    ),
    "comparison": Judgement(
        joined(world.comparison), ("does the order hold ?", "is the last comparison true ?", "compare :")
    ),
    "same words": Judgement(joined(world.same_words), ("same words ?", "are the lists equal ?")),
    "member": Judgement(joined(_member), ("is it in the list ?", "does the list have it ?")),
    "in order": Judgement(world.digits, ("is it in order ?", "are they sorted ?")),
}


# --- Skills with open answers ----------------------------------------------------------------------------------------


QUESTIONS = (world.question, world.question, world.event_question, world.event_question, world.extreme, world.amounts)


def answer_question(rng: Random) -> tuple[str, str]:
    story, question, answer = rng.choice(QUESTIONS)(rng)
    if rng.random() < 0.3:
        question = f"{rng.choice(['answer :', 'reply to the question :', 'what is the answer ?'])} {question}"
    return instruct(rng, question, story), answer


def partner(rng: Random) -> tuple[str, str]:
    """Facts of one kind about several people; which value belongs to a person, or which person to a value?"""
    kind = rng.choice(list(world.FACTS))
    number = rng.randint(2, 4)
    pairs = list(zip(rng.sample(NAMES, number), rng.sample(world.FACT_VALUES[kind], number), strict=True))
    story = world.sentences(*(world.state(rng, kind, *pair) for pair in pairs))
    known, answer = rng.choice(pairs) if coin(rng) else rng.choice(pairs)[::-1]
    return instruct(
        rng, rng.choice(["who or what goes with {} ?", "find the other of {} :"]).format(known), story
    ), answer


def count(rng: Random) -> tuple[str, str]:
    text, category, number = world.category_list(rng)
    ask = rng.choice(["how many words for a {} ?", "count {} :", "number of {} ?"])
    return instruct(rng, ask.format(category), text), NUMBERS[number]


def count_word(rng: Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 3))
    number = rng.randint(0, 4)
    texts = [words[0]] * number + [rng.choice(words[1:]) for _ in range(rng.randint(1, 3))]
    rng.shuffle(texts)
    ask = rng.choice(["how many times {} ?", "count {} :", "how often is {} there ?"])
    return instruct(rng, ask.format(words[0]), " ".join(texts)), NUMBERS[number]


def count_reviews(rng: Random) -> tuple[str, str]:
    text, number = world.several_reviews(rng, rng.randint(2, 3))
    ask, negative = rng.choice(["how many are {} ?", "count the {} ones :"]), coin(rng)
    number = text.count(" .") - number if negative else number
    return instruct(rng, ask.format("negative" if negative else "positive"), text), NUMBERS[number]


def transform(rng: Random) -> tuple[str, str]:
    """Copy a list, reverse it, or select some of its words."""
    words = world.word_list(rng)
    asks, answer = rng.choice(
        [
            (("copy :", "repeat the words :", "say it again :"), words),
            (("reverse :", "say it backwards :", "from the last to the first :"), words[::-1]),
            (("first word :", "what comes first ?"), words[:1]),
            (("last word :", "what comes last ?"), words[-1:]),
            (("second word :", "what comes second ?"), words[1:2]),
            (("first and last word :", "both ends :"), [words[0], words[-1]]),
        ]
    )
    return instruct(rng, rng.choice(asks), " ".join(words)), " ".join(answer)


def neighbour(rng: Random) -> tuple[str, str]:
    """Which word comes after, or before, a word of a list?"""
    words = world.word_list(rng, 3, 8)
    i = rng.randrange(len(words) - 1)
    known, answer = words[i : i + 2]
    asks = ["what follows {} ?", "next after {} :", "the word after {} ?"]
    if rng.random() < 0.3:
        known, answer = answer, known
        asks = ["what is before {} ?", "the word before {} ?"]
    return instruct(rng, rng.choice(asks).format(known), " ".join(words)), answer


def missing(rng: Random) -> tuple[str, str]:
    """Two lists with the same words in any order, except that one is missing; which?"""
    words = world.word_list(rng, 3, 5)
    rest = rng.sample(words, len(words))
    answer = rest.pop()
    ask = rng.choice(["what is missing ?", "which word is gone ?"])
    return instruct(rng, ask, f"{' '.join(words)} | {' '.join(rest)}"), answer


def twice(rng: Random) -> tuple[str, str]:
    """Which word of a list occurs twice?"""
    words = world.word_list(rng, 3, 5)
    text = [*words, rng.choice(words)]
    answer = text[-1]
    rng.shuffle(text)
    return instruct(rng, rng.choice(["what is there twice ?", "which word is repeated ?"]), " ".join(text)), answer


def look_up(rng: Random) -> tuple[str, str]:
    """Pairs of words; which word is paired with a given one?"""
    words = rng.sample(LABELS, 2 * rng.randint(2, 4))  # no held-out word: the rules read like those for labels
    pairs = list(zip(words[::2], words[1::2], strict=True))
    rules = " , ".join(f"{key} {answer}" for key, answer in pairs)
    key, answer = rng.choice(pairs)
    ask = rng.choice(["what is {} ?", "look up {} :", "{} ?"])
    return instruct(rng, ask.format(key), f"{rules} ."), answer


def sort(rng: Random) -> tuple[str, str]:
    digits = rng.sample(DIGITS, rng.randint(2, 5))
    asks, answer = rng.choice(
        [
            (("sort :", "put in order :", "from low to high :"), sorted(digits)),
            (("sort down :", "from high to low :"), sorted(digits, reverse=True)),
            (("which is the most ?", "highest :"), [max(digits)]),
            (("which is the least ?", "lowest :"), [min(digits)]),
        ]
    )
    return instruct(rng, rng.choice(asks), " ".join(digits)), " ".join(answer)


def pick(rng: Random) -> tuple[str, str]:
    """Which words of a list belong to a category, or which word does not belong to the others?"""
    category, other = rng.sample(list(CATEGORIES), 2)
    if coin(rng):
        ask, number = rng.choice(["which is a {} ?", "find each {} :"]).format(category), rng.randint(1, 3)
    else:
        ask, number = rng.choice(["which does not belong ?", "odd one out :"]), 1
    words = rng.sample(CATEGORIES[category], number) + rng.sample(CATEGORIES[other], rng.randint(2, 4))
    rng.shuffle(words)
    return instruct(rng, ask, " ".join(words)), " ".join(word for word in words if word in CATEGORIES[category])


def label_word(rng: Random) -> tuple[str, str]:
    """Label a word by its category, with a rule for each category."""
    kinds = rng.sample(list(CATEGORIES), rng.randint(2, 4))
    labels = rng.sample(LABELS, len(kinds))
    picked = rng.randrange(len(kinds))
    rules = " , ".join(f"{kind} {label}" for label, kind in zip(labels, kinds, strict=True))
    ask = rng.choice(["kind :", "what kind of word ?", "what is it ?"])
    return instruct(rng, f"{ask} {rules} .", rng.choice(CATEGORIES[kinds[picked]])), labels[picked]


def word_kind(rng: Random) -> tuple[str, str]:
    category = rng.choice(list(CATEGORIES))
    ask = rng.choice(["what kind of word ?", "kind :", "what is it ?"])
    return instruct(rng, ask, rng.choice(CATEGORIES[category])), category


def related_word(rng: Random) -> tuple[str, str]:
    if coin(rng):
        pairs, asks = OPPOSITES, ["the opposite of {} ?", "opposite : {}"]
    else:
        pairs, asks = SYNONYMS, ["another word for {} ?", "synonym : {}"]
    known, answer = rng.sample(rng.choice(pairs), 2)
    return rng.choice(asks).format(known), answer


def statement(rng: Random) -> str:
    """Any text of the templates."""
    make = rng.choice(
        [
            world.review,
            world.aspect_review,
            world.topical,
            joined(world.word_in_context),
            joined(world.entailment),
            joined(world.paraphrase),
            joined(world.comparison),
            world.question,
            world.amounts,
            world.category_list,
        ]
    )
    return make(rng)[0]


def fill_gaps(rng: Random) -> tuple[str, str]:
    """T5's span corruption: one or two spans of one to three words, replaced by sentinels."""
    words = statement(rng).split()
    while len(words) < 8:
        words += statement(rng).split()
    half = len(words) // 2
    spans = [(0, half), (half, len(words))] if coin(rng) else [(0, len(words))]
    text, target, done = [], [], 0
    for i, (low, high) in enumerate(spans):
        length = rng.randint(1, 3)
        start = rng.randint(low, high - length)
        text += [*words[done:start], f"<extra_id_{i}>"]
        target += [f"<extra_id_{i}>", *words[start : start + length]]
        done = start + length
    return " ".join(text + words[done:]), " ".join(target)


# Skill: its share of the mixture early and late in pretraining, and its function. The model learns relational skills
# after it can find and copy words. The early mixture therefore has mostly lists and look-ups, the late one relations.
SKILLS: dict[str, tuple[float, float, Callable[[Random], tuple[str, str]]]] = {
    "sentiment": (6, 5, JUDGEMENTS["sentiment"]),
    "aspect": (0, 4, JUDGEMENTS["aspect"]),
    "topic": (4, 4, JUDGEMENTS["topic"]),
    "word sense": (0, 3, JUDGEMENTS["word sense"]),
    "same topic": (0, 5, JUDGEMENTS["same topic"]),
    "word in context": (0, 6, JUDGEMENTS["word in context"]),
    "entailment": (2, 7, JUDGEMENTS["entailment"]),
    "yes or no": (2, 5, JUDGEMENTS["yes or no"]),
    "paraphrase": (0, 6, JUDGEMENTS["paraphrase"]),
    "comparison": (0, 5, JUDGEMENTS["comparison"]),
    "same words": (4, 4, JUDGEMENTS["same words"]),
    "member": (6, 4, JUDGEMENTS["member"]),
    "in order": (0, 2, JUDGEMENTS["in order"]),
    "question": (8, 8, answer_question),
    "partner": (6, 3, partner),
    "count": (1, 3, count),
    "count word": (1, 2, count_word),
    "count reviews": (0, 3, count_reviews),
    "transform": (8, 3, transform),
    "neighbour": (16, 4, neighbour),
    "missing": (4, 2, missing),
    "twice": (2, 2, twice),
    "look up": (20, 6, look_up),
    "sort": (2, 2, sort),
    "pick": (3, 2, pick),
    "word kind": (3, 1, word_kind),
    "label word": (10, 3, label_word),
    "related word": (1, 1, related_word),
    "fill gaps": (2, 4, fill_gaps),
}


def mixture(rng: Random, number: int, early: bool = False) -> list[tuple[str, str]]:
    """Draw `number` pretraining examples (input and target texts) from all skills according to their shares."""
    shares = [skill[0 if early else 1] for skill in SKILLS.values()]
    makers = [make for *_, make in SKILLS.values()]
    return [make(rng) for make in rng.choices(makers, shares, k=number)]
