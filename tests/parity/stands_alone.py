"""What a user does with an exported directory, in a process that has PyTorch and Transformers and nothing of ours.

`python -I stands_alone.py JOBS.json RESULTS.npz` loads every directory, answers its chats, and saves the arrays.
"""

import json
import sys

for name in ("stepjax", "pallas_kernels", "jax", "flax", "torchvision", "timm"):
    sys.modules[name] = None  # an import of it fails

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # more wait for each other where others compute
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def load(directory):
    loaded, report = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded.eval()


def answers(model, processor, chats, **options):
    """The inputs of chats as one batch, and the tokens generated from them."""
    chats, wishes = [chat["messages"] for chat in chats], chats[0]["options"]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True, **wishes
    )
    outputs = model.generate(**inputs, **GREEDY, **options)
    return inputs, outputs[:, inputs["input_ids"].shape[1] :]


def answer_chats(job, results):
    name, chats = job["name"], job["chats"]
    model = load(job["directory"])
    processor = AutoProcessor.from_pretrained(job["directory"], trust_remote_code=True)
    for i, chat in enumerate(chats):
        inputs, generated = answers(model, processor, [chat])
        results |= {f"{name}/{i}/{key}": value.numpy() for key, value in inputs.items()}
        results[f"{name}/{i}/logits"] = model(**inputs).logits.numpy()
        results[f"{name}/{i}/text"] = np.array(processor.decode(generated[0], skip_special_tokens=True))
        results[f"{name}/{i}/without_cache"] = model.generate(**inputs, **GREEDY, use_cache=False).numpy()
        results[f"{name}/{i}/generated"] = generated.numpy()
        if "again" in job:
            results[f"{name}/{i}/beams"] = answers(model, processor, [chat], num_beams=2)[1].numpy()
    if "again" in job:
        same = [chat for chat in chats if chat["options"] == chats[0]["options"]]
        for key, options in (("generated", {}), ("beams", {"num_beams": 2})):
            results[f"{name}/batch/{key}"] = answers(model, processor, same, **options)[1].numpy()
        model.save_pretrained(job["again"], max_shard_size="1MB")
        processor.save_pretrained(job["again"])
        again, processor = load(job["again"]), AutoProcessor.from_pretrained(job["again"], trust_remote_code=True)
        results[f"{name}/again/generated"] = answers(again, processor, [chats[0]])[1].numpy()


def answer_recorded(job, results):
    model, recorded = load(job["directory"]), np.load(job["recorded"])
    inputs = {key: torch.tensor(recorded[key]) for key in recorded.files}
    results[f"{job['name']}/logits"] = model(**inputs).logits.numpy()
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=None)
    results[f"{job['name']}/generated"] = generated[:, inputs["input_ids"].shape[1] :].numpy()


def list_shapes(job, results):
    config = AutoConfig.from_pretrained(job["directory"], trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    results |= {f"{job['name']}/{key}": np.array(value.shape) for key, value in model.state_dict().items()}
    config.save_pretrained(job["again"])


if __name__ == "__main__":
    arrays = {}
    with torch.no_grad(), open(sys.argv[1]) as jobs:
        for each in json.load(jobs):
            {"chats": answer_chats, "recorded": answer_recorded, "shapes": list_shapes}[each["kind"]](each, arrays)
    np.savez(sys.argv[2], **arrays)
