"""Train an adapter of the embedded tiny model, save it, load it, and compare it with its base.

python examples/quickstart.py
"""

import tempfile
from typing import Any

from transformers import TrainingArguments

import reftnoise as rn


def answer(model: Any, tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


model, tokenizer = rn.load_tiny_model()  # or any causal language model of transformers
loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
config = rn.ReftConfig([loreft, {"intervention": "symnoise", "alpha": 5.0}])
reft_model = rn.get_reft_model(model, config)

examples = rn.load_tiny_examples("train")  # questions with answers in emoji
prompts, completions = [e.prompt for e in examples], [e.completion for e in examples]
data_module = rn.make_last_position_supervised_data_module(
    tokenizer, model, prompts, completions, chat_template=True
)
with tempfile.TemporaryDirectory() as directory:
    args = TrainingArguments(directory, num_train_epochs=10, learning_rate=8e-3, report_to="none")
    rn.ReftTrainerForCausalLM(reft_model, args, processing_class=tokenizer, **data_module).train()
    reft_model.save_pretrained(f"{directory}/adapter")
    reft_model = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], f"{directory}/adapter")

print("adapted:", answer(reft_model, tokenizer, "Where does a bear live?"))
with reft_model.disabled():
    print("base:   ", answer(reft_model, tokenizer, "Where does a bear live?"))
