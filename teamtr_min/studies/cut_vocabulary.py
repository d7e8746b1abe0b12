"""A model of another tokenizer and size, made from one with byte-level BPE: its vocabulary, cut short.

    python -m teamtr_min.studies.cut_vocabulary DIR OUT --size 8192

Keeps the first `size` tokens, the merges between them, and their rows of the embedding (and of the head,
where that is another). Text comes in more and shorter pieces then, all of which the model knows, if seldom in
this company. It is for trying teams of unequal models where only one real model is at hand.
"""

import argparse
import shutil
import sys
from pathlib import Path

from torch import nn

from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.hf.weights import load_model, save_model


def cut_tokenizer(tokenizer: dict, size: int) -> dict:
    """tokenizer.json with the tokens below `size` alone. Raises UserError where another needs one above."""
    bpe = tokenizer["model"]
    if bpe["type"] != "BPE" or max(t["id"] for t in tokenizer["added_tokens"]) >= size:
        raise UserError(f"only byte-level BPE with its special tokens among the first {size} can be cut")
    kept = {text: number for text, number in bpe["vocab"].items() if number < size}
    if sorted(kept.values()) != list(range(size)):
        raise UserError(f"the vocabulary has no {size} tokens in a row")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    merges = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    return tokenizer | {"model": bpe | {"vocab": kept, "merges": merges}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="a directory with model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="directory of the new model")
    parser.add_argument("--size", type=int, required=True, help="tokens to keep")
    args = parser.parse_args(argv)
    try:
        tokenizer = cut_tokenizer(read_json(args.model / "tokenizer.json"), args.size)
        model = load_model(args.model)
        model.config = type(model.config)(**vars(model.config) | {"vocab_size": args.size})
        embedding = model.model.embed_tokens
        embedding.weight = nn.Parameter(embedding.weight.detach()[: args.size].clone())
        if not model.config.tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach()[: args.size].clone())
        save_model(model, args.out)
        write_json(args.out / "tokenizer.json", tokenizer)
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (args.model / name).is_file():
                shutil.copy(args.model / name, args.out / name)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
