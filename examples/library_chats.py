"""Questions about the standard library with their answers, as conversations for `moestro tune`.

Made from the docstrings that every Python brings along: the same on every machine with the same
Python. Modules are held out, not questions, so that no answer has been seen next to its like.

    python examples/library_chats.py FOLDER [--plain]   # train.jsonl and held.jsonl there
"""

import argparse
import ast
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from moestro.data.builtin import library_files

SHORTEST, LONGEST = 20, 300  # characters of an answer
HELD_OUT = 8  # one module in so many


def module_of(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


def number_of(path: Path) -> int:
    return int(hashlib.sha256(module_of(path).encode()).hexdigest()[:8], 16)


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """A question about each public function and class of a module, and its answer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return
    for parent in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        inside = f"{parent.name}." if isinstance(parent, ast.ClassDef) else ""
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if not SHORTEST <= len(answer) <= LONGEST or ">>>" in answer:
                continue
            name, module = f"{inside}{node.name}", module_of(path)
            if isinstance(node, ast.ClassDef):
                yield f"What is the class {name} of {module}?", answer
            else:
                yield f"What does {name}({ast.unparse(node.args)}) of {module} do?", answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="without chat template")
    parser.add_argument("--most", type=int, default=10_000, help="conversations")
    args = parser.parse_args()
    sides: dict[str, list[str]] = {"train": [], "held": []}
    files = [path for path in library_files() if path.suffix == ".py"]
    for path in sorted(files, key=lambda path: (number_of(path), path.as_posix())):
        side = sides["train" if number_of(path) % HELD_OUT else "held"]
        for question, answer in documented(path):
            said = {"user": question, "assistant": answer}
            chat = [{"role": role, "content": text} for role, text in said.items()]
            plain = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
            side.append(json.dumps(plain if args.plain else {"messages": chat}))
        if sum(map(len, sides.values())) >= args.most and all(sides.values()):
            break
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in sides.items():
        (args.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{args.folder / name}.jsonl: {len(lines):,} conversations")


if __name__ == "__main__":
    main()
