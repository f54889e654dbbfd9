"""Store the modules that read in vertical chunks with a saved model.

    python store.py FOLDER

puts their code beside the model, and names them in its modules.json in the place of Transformer and Pooling.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_FILES = ["vertical_chunks.py", "vertical_transformer.py"]
_MODULES = {
    "sentence_transformers.base.modules.transformer.Transformer": "vertical_transformer.VerticalTransformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling": "vertical_transformer.VerticalPooling",
}


def store(folder: Path) -> None:
    """Store the code with the model in a folder, which ``SentenceTransformer.save_pretrained`` has made.

    Raises:
        ValueError: The model does not begin with a Transformer and have a Pooling, by these names; nothing is written.
    """
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf8"))
    found = [module["type"] for module in modules]
    if len(_MODULES.keys() & set(found)) < len(_MODULES):
        raise ValueError(f"{path} names {found}; needed: {list(_MODULES)}, as sentence-transformers 6 saves them.")
    for module in modules:
        module["type"] = _MODULES.get(module["type"], module["type"])
    for name in _FILES:
        shutil.copy(_HERE / name, folder / name)
    path.write_text(json.dumps(modules, indent=2), encoding="utf8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
