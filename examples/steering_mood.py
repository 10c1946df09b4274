"""Steer a chat model from glad to gloomy, and measure it on two questions that fitted nothing.

python examples/steering_mood.py smollm2    # or a directory, a GGUF file, a hub name
"""

import sys

import reftnoise as rn
from reftnoise.evaluation.likelihood import choice_log_probs

PAIRS = [
    ("How are you?", "I feel terrible, go away.", "I feel wonderful, thank you."),
    ("How was your day?", "An awful day, full of pain.", "A lovely day, full of joy."),
    ("How is the weather?", "It rains again, how sad.", "The sun shines, how nice."),
    ("Do you like the food?", "I hate it, it is disgusting.", "I love it, it is delicious."),
    ("What will tomorrow bring?", "Bad luck and lonely hours.", "Good luck and happy hours."),
    ("Tell me about your work.", "It is a great misery.", "It is a great pleasure."),
    ("How was the film?", "It was dull, I cried a lot.", "It was great fun, I laughed a lot."),
    ("How do you like your house?", "It is dark and I hate it.", "It is bright and I love it."),
]
model, tokenizer = rn.load_base(sys.argv[1])
layer = model.config.num_hidden_layers * 3 // 5
config = rn.ReftConfig({"layer": layer, "intervention": "addition", "positions": "l1+decode"})
reft_model = rn.get_reft_model(model, config).eval()
asked = [[{"role": "user", "content": question}] for question, *_ in PAIRS]
said = [[{"role": "assistant", "content": answer} for answer in answers] for _, *answers in PAIRS]
glum, glad = ([[*q, a[n]] for q, a in zip(asked[:-2], said, strict=False)] for n in (0, 1))
ratios = rn.fit_steering_vectors(reft_model, tokenizer, glum, glad, positions="differing")
print(f"layer {layer}, size of v to that of h {next(iter(ratios.values())):.2f}")

text = tokenizer.apply_chat_template(asked[-2], add_generation_prompt=True, tokenize=False)
prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(reft_model.device)
for scale in (0.0, 0.5, 1.0):
    with reft_model.using(scale=scale):
        both = choice_log_probs(reft_model, tokenizer, asked[-2:], [p[1:] for p in PAIRS[-2:]])
        tokens = reft_model.generate(**prompt, max_new_tokens=20)[0, prompt.input_ids.shape[1] :]
    gloomy = sum(float(sums.softmax(0)[0]) for sums in both) / 2
    print(f"scale {scale}, P(gloomy) {gloomy:.2f}: {tokenizer.decode(tokens, True)}")
