"""Quantize a model, save it, load it again, let it write.

python examples/quickstart.py HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-W4 --group-size 64
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

from woq import AutoModelForCausalLM, GPTQConfig, quantize_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder or hub id of the float model")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--prompt", default="The capital of France is")
    options = parser.parse_args()

    config = GPTQConfig(
        bits=options.bits,
        group_size=options.group_size,
        num_samples=options.num_samples,
        seq_len=options.seq_len,
    )
    report = quantize_folder(options.source, options.target, config)
    print(
        f"{len(report.layers)} layers, {report.plan.coverage:.1%} of the blocks' weights, {report.seconds:.0f} s"
    )
    for note in report.notes:
        print(note)

    model = AutoModelForCausalLM.from_pretrained(options.target)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(prompt.input_ids, max_new_tokens=40)[0]))


if __name__ == "__main__":
    main()
