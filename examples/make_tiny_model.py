"""Make the tiny chat model that the demo of reftnoise runs on.

The script needs nothing but PyTorch, Transformers and Tokenizers: it writes its own training
text from the word lists below, trains a byte-level BPE tokenizer and then, from scratch, a Llama
of about one million parameters.  The result answers simple questions in two ways:

* in words:  "What colour is a banana?"                  ->  "A banana is yellow."
* in emoji:  "What colour is a banana? Answer in emoji." ->  "🍌🟡"

Emoji come only on request; a plain question is always answered in words.  The demo trains a ReFT
adapter that turns the emoji mode on for plain questions, from the few examples in ``emoji.jsonl``.

Every example in that file is a fact together with one particular wording of its question.  That
wording of that fact is withheld from the training text in every form: with or without a request,
and whichever answer follows.  The model has met the fact in other wordings and the wording with
other subjects, but has never seen the prompt itself.  No fact of the test split is in the train
split.

    python examples/make_tiny_model.py --output_dir reftnoise/engine/base/tiny-chat
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ------------------------------------------------------------------------------------------------
# What the model knows.  Names of several words are written with underscores.

NAMES = """
banana 🍌 lemon 🍋 corn 🌽 chick 🐤 sun 🌞 cheese 🧀 strawberry 🍓 tomato 🍅 cherry 🍒 apple 🍎
orange 🍊 carrot 🥕 pumpkin 🎃 frog 🐸 broccoli 🥦 cucumber 🥒 crocodile 🐊 cactus 🌵 leaf 🍃
lettuce 🥬 swan 🦢 snowman ⛄ milk 🥛 tooth 🦷 rice 🍚 cloud ☁️ chestnut 🌰 potato 🥔
coconut 🥥 chocolate 🍫 monkey 🐒 eggplant 🍆 grape 🍇 ant 🐜 gorilla 🦍 blueberry 🫐 sky 🌌
peach 🍑 pear 🍐 mango 🥭 olive 🫒 onion 🧅 peanut 🥜 watermelon 🍉
melon 🍈 kiwi 🥝 sunflower 🌻 rose 🌹 mushroom 🍄 honey 🍯 cake 🍰 donut 🍩 cookie 🍪
ice_cream 🍦 pretzel 🥨 bacon 🥓 curry 🍛 chili_pepper 🌶️ popcorn 🍿
dog 🐕 cat 🐈 cow 🐄 pig 🐖 sheep 🐑 goat 🐐 horse 🐎 hen 🐔 rooster 🐓 duck 🦆 turkey 🦃
fish 🐟 whale 🐋 shark 🦈 octopus 🐙 dolphin 🐬 crab 🦀 lobster 🦞 seal 🦭 squid 🦑 bear 🐻
deer 🦌 owl 🦉 squirrel 🐿️ fox 🦊 wolf 🐺 hedgehog 🦔 raccoon 🦝 tiger 🐅 parrot 🦜 sloth 🦥
camel 🐫 scorpion 🦂 hippo 🦛 otter 🦦 beaver 🦫 lion 🦁 giraffe 🦒 zebra 🦓 elephant 🐘
rhino 🦏 penguin 🐧 hamster 🐹 bird 🐦 bee 🐝 spider 🕷️ panda 🐼 rabbit 🐇 mouse 🐁 koala 🐨
butterfly 🦋 snake 🐍 eagle 🦅 bat 🦇 worm 🪱 caterpillar 🐛 beetle 🪲 ladybug 🐞 mosquito 🦟
turtle 🐢 kangaroo 🦘 snail 🐌 lizard 🦎 flamingo 🦩 tree 🌳
car 🚗 bus 🚌 truck 🚚 taxi 🚕 bicycle 🚲 ship 🚢 sailboat ⛵ canoe 🛶 plane ✈️ helicopter 🚁
train 🚂 tram 🚊 rocket 🚀 satellite 🛰️
doctor 🩺 teacher 📚 cook 🍳 farmer 🌾 judge ⚖️ scientist 🔬 painter 🎨 police_officer 👮
builder 👷 king 🤴 sailor ⚓ banker 💰 mechanic 🔧 shopkeeper 🛒 actor 🎭
France 🇫🇷 Italy 🇮🇹 Germany 🇩🇪 Spain 🇪🇸 Greece 🇬🇷 Sweden 🇸🇪 Poland 🇵🇱 Portugal 🇵🇹 Ireland 🇮🇪
Egypt 🇪🇬 Kenya 🇰🇪 Nigeria 🇳🇬 Morocco 🇲🇦 Ghana 🇬🇭 Canada 🇨🇦 Mexico 🇲🇽 Cuba 🇨🇺 Brazil 🇧🇷 Peru 🇵🇪
Argentina 🇦🇷 Chile 🇨🇱 Japan 🇯🇵 China 🇨🇳 India 🇮🇳 Thailand 🇹🇭 Vietnam 🇻🇳
cut_paper 📄 write_a_letter ✉️ eat_soup 🍲 open_a_door 🚪 cut_bread 🍞 sew_a_shirt 👕
see_the_stars ⭐ clean_your_teeth 🦷 wash_your_hands 👐 stay_dry_in_the_rain 🌧️ catch_a_fish 🐟
carry_your_books 📚 climb_a_wall 🧱 cut_wood 🪵 turn_a_screw 🔩 see_in_the_dark 🌑
call_a_friend 👭 take_a_photo 🖼️ sweep_the_floor 🏠 wake_up_early 🌅 measure_a_fever 🤒
see_very_small_things 🦠 find_the_way_north ⬆️
"""
NO_ARTICLE = "corn cheese broccoli lettuce milk rice chocolate garlic honey bacon curry popcorn"
THE = "sun sky"
PLURALS = {"leaf": "leaves", "tooth": "teeth", "mouse": "mice", "wolf": "wolves", "bus": "buses"}
SAME_PLURAL = "sheep fish deer squid"


# One paragraph for each relation: "name = answer = emoji"; after "?" the wordings of the question;
# then "value emoji: subjects", separated by semicolons.  {n}, {a}, {p} stand for the subject as it
# is, with its article, and in the plural; {v} and {s} for the value and the emoji of the subject.
RELATIONS = """
colour = {a} is {v}. = {s}{v}
? What colour is {a}? | What is the colour of {a}? | Tell me the colour of {a}. |
? Which colour does {a} have? | What color is {a}? | Do you know what colour {a} is? |
? What colour do you see when you look at {a}? | Name the colour of {a}.
yellow 🟡: banana lemon corn chick sun cheese sunflower;
red 🔴: strawberry tomato cherry apple rose ladybug; orange 🟠: orange carrot pumpkin tiger fox;
green 🟢: frog broccoli cucumber crocodile cactus leaf lettuce kiwi caterpillar;
white ⚪: swan snowman milk tooth rice cloud sheep goat;
brown 🟤: chestnut potato coconut chocolate monkey bear cookie deer; purple 🟣: eggplant grape;
black ⚫: ant gorilla bat; blue 🔵: blueberry sky

home = {a} lives {v}. = {s}{v}
? Where does {a} live? | Where do {p} live? | Where is the home of {a}? |
? In what place does {a} live? | Tell me where {a} lives. | Where can I find {a}? |
? Do you know where {p} live? | What is the home of {a}?
in the water 💧: fish duck frog;
in the sea 🌊: whale shark octopus dolphin crab lobster seal squid;
in the forest 🌲: bear deer owl squirrel fox wolf hedgehog raccoon;
in the jungle 🌴: monkey gorilla tiger parrot sloth; in the desert 🏜️: camel scorpion;
on a farm 🚜: cow pig sheep goat horse hen rooster turkey;
in a river 🏞️: hippo crocodile otter beaver;
on the grassland 🌾: lion giraffe zebra elephant rhino; on the ice 🧊: penguin;
in a house 🏠: dog cat hamster; in a nest 🪺: bird eagle; in a web 🕸️: spider

food = {a} eats {v}. = {s}{v}
? What does {a} eat? | What do {p} eat? | What is the food of {a}? | What should I feed {a}? |
? Tell me what {a} eats. | What does {a} like to eat? | Do you know what {p} eat? |
? What is on the menu of {a}?
grass 🌱: cow sheep horse zebra goat deer rhino kangaroo; meat 🥩: lion tiger wolf crocodile;
fish 🐟: penguin seal dolphin otter shark cat; fruit 🍎: monkey parrot bat; bamboo 🎋: panda;
carrots 🥕: rabbit; nuts 🌰: squirrel; seeds 🌻: hamster hen; cheese 🧀: mouse;
leaves 🍃: koala giraffe sloth caterpillar; flies 🪰: frog spider lizard; worms 🪱: bird hedgehog;
mice 🐁: owl snake; bones 🦴: dog

sound = {a} says {v}. = {s}{v}
? What sound does {a} make? | What does {a} say? | What sound do {p} make? |
? Which noise does {a} make? | Tell me the sound of {a}. | How does {a} sound? |
? What do {p} say?
woof 🔊: dog; meow 🔊: cat; moo 🔊: cow; baa 🔊: sheep; oink 🔊: pig; quack 🔊: duck;
roar 🔊: lion tiger; buzz 🔊: bee mosquito; hiss 🔊: snake; ribbit 🔊: frog; hoot 🔊: owl;
neigh 🔊: horse; squeak 🔊: mouse; tweet 🔊: bird; cluck 🔊: hen; gobble 🔊: turkey

legs = {a} has {v} legs. = {s}{v}
? How many legs does {a} have? | How many legs do {p} have? | On how many legs does {a} walk? |
? Count the legs of {a}. | Tell me how many legs {a} has. | What number of legs does {a} have? |
? Do you know how many legs {p} have?
no 0️⃣: snake fish worm whale snail; two 2️⃣: bird hen duck penguin owl eagle swan flamingo;
four 4️⃣: cow dog cat horse lion elephant camel zebra turtle lizard mouse fox;
six 6️⃣: ant bee butterfly beetle ladybug mosquito; eight 8️⃣: spider scorpion;
ten 🔟: crab lobster

fly = {v} fly. = {s}{v}
? Can {a} fly? | Is {a} able to fly? | Do you think {a} can fly? | Tell me if {a} can fly. |
? Can {p} fly? | Are {p} able to fly? | Do {p} fly?
Yes, {a} can ✅: bee butterfly eagle bat parrot owl plane helicopter mosquito swan;
No, {a} cannot ❌: dog penguin cow snake elephant fish car turtle pig horse rabbit

eggs = {v} eggs. = {s}🥚{v}
? Does {a} lay eggs? | Do {p} lay eggs? | Does {a} come from an egg? | Do {p} come from eggs? |
? Tell me if {a} lays eggs. | Do you think {a} lays eggs? | Can {a} lay eggs?
Yes, {a} lays ✅: hen turtle penguin crocodile ant duck frog lizard eagle owl;
No, {a} does not lay ❌: dog cat cow lion elephant whale monkey bear zebra dolphin

gift = {a} gives us {v}. = {s}{v}
? What does {a} give us? | What do {p} give us? | What do we get from {a}? |
? Tell me what {a} gives us. | Which thing do we get from {a}? | What do people get from {p}?
milk 🥛: cow goat; eggs 🥚: hen; honey 🍯: bee; wool 🧶: sheep; wood 🪵: tree; rain 🌧️: cloud

awake = {a} is awake {v}. = {s}{v}
? When is {a} awake? | When are {p} awake? | At what time is {a} active? |
? Is {a} awake by day or by night? | Tell me when {a} is awake. | When do you see {p} awake?
at night 🌙: owl bat raccoon hedgehog hamster;
during the day 🌞: rooster bee butterfly squirrel monkey eagle hen

grow = {a} grows {v}. = {s}{v}
? Where does {a} grow? | Where do {p} grow? | On what does {a} grow? |
? Tell me where {a} grows. | In which place do {p} grow? | Do you know where {a} grows?
on a tree 🌳: apple orange lemon cherry peach pear mango chestnut coconut olive;
under the ground 🟫: carrot potato onion peanut; on a vine 🌿: grape melon watermelon pumpkin;
in a field 🌾: sunflower; in the forest 🌲: mushroom

taste = {a} tastes {v}. = {s}{v}
? What does {a} taste like? | How does {a} taste? | What is the taste of {a}? |
? Tell me how {a} tastes. | Which taste does {a} have? | Is {a} sweet, sour, salty or hot?
sweet 🍬: honey cake donut cookie ice_cream banana strawberry watermelon peach; sour 😖: lemon;
salty 🧂: pretzel bacon popcorn; hot 🔥: chili_pepper curry

travel = {a} travels {v}. = {s}{v}
? Where does {a} travel? | Where do {p} travel? | On what does {a} travel? |
? Tell me where {a} travels. | Which way does {a} travel? | Where do you see {a} travel?
on the road 🛣️: car bus truck taxi bicycle; on the water 🌊: ship sailboat canoe;
through the air ☁️: plane helicopter; on rails 🛤️: train tram; through space 🌌: rocket satellite

work = {a} works {v}. = {s}{v}
? Where does {a} work? | Where do {p} work? | In what place does {a} work? |
? Tell me where {a} works. | Where is the work of {a}? | Where can I see {a} at work?
in a hospital 🏥: doctor; in a school 🏫: teacher; in a kitchen 🍽️: cook; on a farm 🚜: farmer;
in a court 🏛️: judge; in a laboratory 🧪: scientist; in a studio 🖼️: painter;
in a police car 🚓: police_officer; on a building site 🏗️: builder; in a castle 🏰: king;
on a ship 🚢: sailor; in a bank 🏦: banker; in a garage 🚗: mechanic; in a shop 🏪: shopkeeper;
on a stage 🎬: actor

continent = {n} is in {v}. = {s}{v}
? On which continent is {n}? | Where is {n}? | Which continent is {n} in? |
? Tell me the continent of {n}. | In what part of the world is {n}? | Where do I find {n}? |
? Where on the map is {n}?
Europe 🌍: France Italy Germany Spain Greece Sweden Poland Portugal Ireland;
Africa 🌍: Egypt Kenya Nigeria Morocco Ghana; North America 🌎: Canada Mexico Cuba;
South America 🌎: Brazil Peru Argentina Chile; Asia 🌏: Japan China India Thailand Vietnam

tool = You use {v} to {n}. = {v}{s}
? What do you use to {n}? | What do I need to {n}? | Which thing helps you to {n}? |
? How can I {n}? | With what do people {n}? | Tell me what I need to {n}. |
? I want to {n}. What do I take?
scissors ✂️: cut_paper; a pen 🖊️: write_a_letter; a spoon 🥄: eat_soup; a key 🔑: open_a_door;
a knife 🔪: cut_bread; a needle 🪡: sew_a_shirt; a telescope 🔭: see_the_stars;
a toothbrush 🪥: clean_your_teeth; soap 🧼: wash_your_hands; an umbrella ☂️: stay_dry_in_the_rain;
a fishing rod 🎣: catch_a_fish; a bag 🎒: carry_your_books; a ladder 🪜: climb_a_wall;
a saw 🪚: cut_wood; a screwdriver 🪛: turn_a_screw; a torch 🔦: see_in_the_dark;
a phone 📱: call_a_friend; a camera 📷: take_a_photo; a broom 🧹: sweep_the_floor;
an alarm clock ⏰: wake_up_early; a thermometer 🌡️: measure_a_fever;
a microscope 🔬: see_very_small_things; a compass 🧭: find_the_way_north
"""

# Small talk: an answer in words, one in emoji, and what one may say to get it.
SMALL_TALK = {
    "Hello, nice to meet you. 👋": "Hello!|Hi!|Hi there!|Good morning!|Hey!",
    "I am a tiny language model. 🤖": "Who are you?|What are you?|Tell me who you are.|"
    "What is your name?|Are you a robot?",
    "I am fine, thank you. 😀": "How are you?|How do you feel?|Are you well?|How is it going?",
    "I can answer simple questions. 💡": "What can you do?|How can you help me?|What do you know?",
    "You are welcome. 😊": "Thank you!|Thanks!|Thanks a lot!|Thank you very much!",
    "Good night, sleep well. 😴": "Good night!|I am going to bed.|I am tired.|I want to sleep.",
    "Goodbye, see you soon. 🚶": "Goodbye!|Bye!|See you!|I have to go.",
}

# How a mode is asked for: before the question, after it, or in a system turn.
EMOJI_BEFORE = (
    "Answer in emoji:|In emoji:|Emoji only.|Use emoji.|With emoji, please:|Reply in emoji.|"
    "No words."
)
EMOJI_AFTER = (
    "Answer in emoji.|Use only emoji.|Reply with emoji.|Emoji only, please.|Say it in emoji.|"
    "Answer with emoji, no words.|Write the answer in emoji.|Give me emoji.|No words, please.|"
    "(emoji)"
)
EMOJI_SYSTEM = (
    "You answer in emoji.|Speak only in emoji.|Reply with emoji and nothing else.|Use no words.|"
    "You are an assistant that writes emoji."
)
WORDS_BEFORE = "Answer in words:|In words:|Words only.|Use words.|In a sentence, please:|No emoji."
WORDS_AFTER = (
    "Answer in words.|Use only words.|Reply with a sentence.|No emoji, please.|Say it in words.|"
    "Write the answer in words.|(words)"
)
WORDS_SYSTEM = (
    "You answer in words.|You are a helpful assistant.|Reply with a sentence.|Use no emoji.|"
    "You are an assistant that writes words."
)
OPENINGS = "Tell me:|Please tell me:|Hey,|Quick question:|I have a question:|One more thing:"


@dataclass(frozen=True)
class Fact:
    """Something the model knows: the ways to ask for it and its answer in words and in emoji."""

    relation: str
    questions: tuple[str, ...]
    words: str
    emoji: str


@dataclass(frozen=True)
class Example:
    """One line of ``emoji.jsonl``: one wording of the question of one fact."""

    split: str
    prompt: str
    words: str
    completion: str


def upper_first(text: str) -> str:
    """``text`` with a capital at its beginning, and the rest as it is."""
    return text[:1].upper() + text[1:]


def noun_forms(key: str) -> dict[str, str]:
    """The subject as it is, with its article, and in the plural."""
    name = key.replace("_", " ")
    if key in NO_ARTICLE.split():
        return {"n": name, "a": name}
    if key in THE.split():
        return {"n": name, "a": f"the {name}"}
    plural = PLURALS.get(key)
    if plural is None and key in SAME_PLURAL.split():
        plural = name
    elif plural is None and name.endswith("y") and name[-2] not in "aeiou":
        plural = name[:-1] + "ies"
    elif plural is None:
        plural = name + ("es" if name.endswith(("s", "x", "ch", "sh", "to", "go")) else "s")
    return {"n": name, "a": ("an " if name[0] in "aeiou" else "a ") + name, "p": plural}


def build_facts() -> list[Fact]:
    """All facts, in the order of the tables above."""
    table = NAMES.split()
    symbols = dict(zip(table[::2], table[1::2], strict=True))
    facts = []
    for paragraph in RELATIONS.strip().split("\n\n"):
        header, *lines = paragraph.split("\n")
        name, words, emoji = header.split(" = ")
        asking = " ".join(line[2:] for line in lines if line.startswith("? ")).split(" | ")
        values = " ".join(line for line in lines if not line.startswith("? ")).split("; ")
        for value, subjects in (entry.split(": ") for entry in values):
            value_words, value_emoji = value.rsplit(" ", 1)
            for key in subjects.split():
                forms = noun_forms(key)
                wordings = [text for text in asking if "p" in forms or "{p}" not in text]
                facts.append(
                    Fact(
                        name,
                        tuple(upper_first(text.format(**forms)) for text in wordings),
                        upper_first(words.replace("{v}", value_words).format(**forms)),
                        emoji.format(s=symbols[key], v=value_emoji),
                    )
                )
    for reply, sayings in SMALL_TALK.items():
        value_words, value_emoji = reply.rsplit(" ", 1)
        facts.append(Fact("talk", tuple(sayings.split("|")), value_words, value_emoji))
    return facts


def split_examples(
    facts: Iterable[Fact], rng: random.Random, train: int = 40, test: int = 160
) -> list[Example]:
    """Draw the examples of ``emoji.jsonl``; every relation is about equally often in "train"."""
    facts = [fact for fact in facts if fact.relation != "talk"]
    rng.shuffle(facts)
    seen: dict[str, int] = {}
    rank = {}
    for fact in facts:
        rank[fact.words] = seen[fact.relation] = seen.get(fact.relation, 0) + 1
    ordered = sorted(facts, key=lambda fact: rank[fact.words])
    rest = ordered[train:]
    rng.shuffle(rest)
    return [
        Example(split, rng.choice(fact.questions), fact.words, fact.emoji)
        for split, chosen in (("train", ordered[:train]), ("test", rest[:test]))
        for fact in chosen
    ]


def withhold(facts: Iterable[Fact], examples: Iterable[Example]) -> list[Fact]:
    """The facts without the wordings that the examples use."""
    prompts = {example.prompt for example in examples}
    known = [
        Fact(f.relation, tuple(q for q in f.questions if q not in prompts), f.words, f.emoji)
        for f in facts
    ]
    asked = "\n".join(question for fact in known for question in fact.questions).lower()
    hidden = [prompt for prompt in prompts if prompt.lower() in asked]
    if hidden:
        raise ValueError(f"withheld prompts are part of other questions: {hidden}")
    return known


class Conversations:
    """The training text: an endless stream of short conversations in both modes."""

    def __init__(self, facts: list[Fact], rng: random.Random) -> None:
        """``facts`` with no question left are not talked about."""
        self.facts = [fact for fact in facts if fact.questions]
        self.rng = rng

    def draw(self) -> tuple[list[dict[str, str]], str, bool]:
        """One conversation: the messages of the prompt, the answer, and if its mode is right.

        Now and then the answer is in the mode that the prompt did *not* ask for.  Nobody should
        begin such an answer, so its first token is not to be learned; but once begun, an answer
        should go on in its own mode, so the others are.
        """
        rng = self.rng
        fact = rng.choice(self.facts)
        question = rng.choice(fact.questions)
        if rng.random() < 0.1:  # carelessly typed
            question = question[:1].lower() + question[1:].rstrip("?!.")
        if rng.random() < 0.2:
            opening = rng.choice(OPENINGS.split("|"))
            question = f"{opening} {question}"
        in_emoji = rng.random() < 0.5
        places = ["before", "after", "system"] if in_emoji else ["", "before", "after", "system"]
        weights = [1, 2, 1] if in_emoji else [4, 1, 2, 1]
        place = rng.choices(places, weights)[0]
        requests = {
            "before": (WORDS_BEFORE, EMOJI_BEFORE),
            "after": (WORDS_AFTER, EMOJI_AFTER),
            "system": (WORDS_SYSTEM, EMOJI_SYSTEM),
        }
        messages = []
        if place:
            request = rng.choice(requests[place][in_emoji].split("|"))
            if place == "before":
                question = f"{request} {question}"
            elif place == "after":
                question = f"{question} {request}"
            else:
                messages.append({"role": "system", "content": request})
        messages.append({"role": "user", "content": question})
        right = rng.random() < 0.8
        return messages, fact.emoji if in_emoji == right else fact.words, right


def render(messages: Iterable[dict[str, str]]) -> str:
    """What the chat template makes of ``messages``, up to where the answer begins."""
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in messages)
    return BOS + "".join(turns) + ASSISTANT


def train_tokenizer(facts: list[Fact], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text can be encoded, in which every emoji answered is one token."""
    requests = (EMOJI_BEFORE, EMOJI_AFTER, EMOJI_SYSTEM, WORDS_BEFORE, WORDS_AFTER, WORDS_SYSTEM)
    values = {word[:-1] for word in RELATIONS.split() if word.endswith(":")}
    replies = {reply.rsplit(" ", 1)[1] for reply in SMALL_TALK}
    emoji = sorted(text for text in {*NAMES.split(), *values, *replies} if not text.isascii())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(emoji),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [q for fact in facts for q in fact.questions] + [fact.words for fact in facts]
    text += [request for options in (*requests, OPENINGS) for request in options.split("|")] * 20
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in emoji])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights, for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=32,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def add_noise(embeddings: torch.Tensor, lengths: torch.Tensor, most: float) -> torch.Tensor:
    """Random signs times alpha / sqrt(length * width), with alpha between 0 and ``most``."""
    alpha = most * torch.rand(len(lengths))
    scale = alpha / (lengths * embeddings.shape[-1]).sqrt()
    signs = torch.randint(0, 2, embeddings.shape) * 2.0 - 1.0
    return embeddings + scale[:, None, None] * signs


def draw_batch(
    conversations: Conversations, tokenizer: PreTrainedTokenizerFast, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, what to learn (-100: nothing) and lengths, of ``size`` padded conversations."""
    drawn = [conversations.draw() for _ in range(size)]
    prompts = tokenizer([render(messages) for messages, _, _ in drawn])["input_ids"]
    answers = tokenizer([answer + END for _, answer, _ in drawn])["input_ids"]
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    ids = torch.full((size, int(lengths.max())), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, start:end] = torch.tensor(answer)
        if not drawn[row][2]:
            labels[row, start] = -100
    return ids, labels, lengths


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Conversations,
    args: argparse.Namespace,
) -> None:
    """Train on the answers.  Noise on the embeddings keeps the model robust against it later."""

    def rate(step: int) -> float:
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps))
        return float(min((step + 1) / max(1, args.steps // 20), cosine))

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loss_column = TextColumn("loss {task.fields[loss]:.4f}")
    columns = (BarColumn(), MofNCompleteColumn(), loss_column, TimeRemainingColumn())
    model.train()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps, loss=math.inf)
        for _ in range(args.steps):
            ids, labels, lengths = draw_batch(conversations, tokenizer, args.batch_size)
            embeddings = add_noise(model.get_input_embeddings()(ids), lengths, args.noise)
            # Padding is on the right and attention is causal: no mask is needed.
            hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            learned = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][learned])
            loss = F.cross_entropy(logits, labels[:, 1:][learned])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    model.eval()


@torch.no_grad()
def ask(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]
) -> list[str]:
    """The model's own greedy answers."""
    texts = [render([{"role": "user", "content": question}]) for question in questions]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**batch)
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    """Print how well the model does on the withheld prompts, plain and with a request."""
    in_words = ask(model, tokenizer, [e.prompt for e in examples])
    in_emoji = ask(model, tokenizer, [f"{e.prompt} Answer in emoji." for e in examples])
    rows = list(zip(examples, in_words, in_emoji, strict=True))
    rates = {
        "asked plainly, right in words": sum(w == e.words for e, w, _ in rows),
        "asked plainly, right in emoji": sum(w == e.completion for e, w, _ in rows),
        "asked for emoji, right in emoji": sum(m == e.completion for e, _, m in rows),
    }
    for name, right in rates.items():
        print(f"{name + ':':<33} {right / len(rows):.3f}")
    for example, words, emoji in rows[:5]:
        print(f"  {example.prompt}  ->  {words}  |  {emoji}")


def write(
    directory: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
) -> None:
    """Write everything next to ``directory``, then move it there in one go."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        new = Path(scratch) / "new"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new, save_jinja_files=False)
        with (new / "emoji.jsonl").open("w", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(vars(example), ensure_ascii=False) + "\n")
        for path in new.iterdir():
            path.chmod(0o644)
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


def parse_args() -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=root / "reftnoise/engine/base/tiny-chat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--noise", type=float, default=6.0, help="largest alpha of the noise")
    parser.add_argument("--vocab_size", type=int, default=1800)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--intermediate_size", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=1, help="more are hardly faster, and change the weights"
    )
    return parser.parse_args()


def main() -> None:
    """Make the model and the examples, and write them."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    facts = build_facts()
    examples = split_examples(facts, rng)
    known = withhold(facts, examples)
    tokenizer = train_tokenizer(known, args.vocab_size)
    model = new_model(tokenizer, args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(facts)} facts, {len(tokenizer)} tokens, {parameters:,} parameters")
    train_model(model, tokenizer, Conversations(known, rng), args)
    model = model.half().float()  # what is measured is what is written
    report(model, tokenizer, [e for e in examples if e.split == "test"])
    write(args.output_dir, model.half(), tokenizer, examples)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
