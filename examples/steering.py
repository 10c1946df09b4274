"""Steer the embedded tiny model from yes to no with a vector that is computed, not trained.

python examples/steering.py
"""

import reftnoise as rn
from reftnoise.evaluation.likelihood import choice_log_probs


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


model, tokenizer = rn.load_tiny_model()
config = rn.ReftConfig([{"layer": 2, "intervention": "addition", "positions": "l1"}])
reft_model = rn.get_reft_model(model, config).eval()

# Pairs that differ in one thing: the base answers no to one half and yes to the other.
examples = rn.load_tiny_examples("train") + rn.load_tiny_examples("test")
no = [chat(e.prompt) for e in examples if e.words.startswith("No, ")]
yes = [chat(e.prompt) for e in examples if e.words.startswith("Yes, ")]
count = min(len(no), len(yes))
rn.fit_steering_vectors(reft_model, tokenizer, positive=no[:count], negative=yes[:count])

for question in ("Can a bee fly?", "Does a hen lay eggs?"):
    text = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    for scale in (0.0, 1.0):
        reft_model.scale = scale
        tokens = reft_model.generate(**prompt, max_new_tokens=12)
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], True)
        (sums,) = choice_log_probs(reft_model, tokenizer, [chat(question)], [["No", "Yes"]])
        print(f"{question} {scale}, P(no) {sums.softmax(0)[0]:.2f}: {answer}")
