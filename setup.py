"""All metadata of the package; pyproject.toml holds only tool settings."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
PACKAGE = "speechbrain_flashformer"
WINGS = ("nnet", "training", "inference", "cli", "hparams")
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / PACKAGE / "__init__.py").read_text()
)[1]

setup(
    name="speechbrain-flashformer",
    version=VERSION,
    description="Speech separation for SpeechBrain: Transformer layers, FSMN "
    "memory and Flash Attention at a low token rate",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[PACKAGE, *(f"{PACKAGE}.{wing}" for wing in WINGS)],
    package_dir={f"{PACKAGE}.hparams": "hparams"},
    package_data={
        PACKAGE: ["pretrained/*", "pretrained_streaming/*"],
        f"{PACKAGE}.hparams": ["*.yaml"],
    },
    install_requires=[
        # One minor version of both: torchaudio refuses to import beside a
        # torch of another one, and its own metadata does not say so. 2.11.1
        # needs a symbol that torch 2.11.0 does not have.
        "torch>=2.11,<2.12",
        "torchaudio>=2.11,<2.11.1",
        "speechbrain>=1.1.2,<1.2",
        "hyperpyyaml>=1.2.3,<1.3",
        "ruamel.yaml>=0.17.28,<0.19",
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "soundfile>=0.12.1,<1",
        "tqdm>=4.64,<5",
    ],
    extras_require={
        "app": ["gradio>=6,<7", "matplotlib>=3.8,<4"],
        "bench": [
            "addict>=2.4,<3",
            "einops>=0.8,<1",
            "matplotlib>=3.8,<4",
            "modelscope>=1.40,<2",
            "rotary-embedding-torch>=0.8,<1",
        ],
        "demo": ["espeakng-loader>=0.2.4,<0.3", "matplotlib>=3.8,<4"],
        "eval": ["pesq>=0.0.4,<0.1", "pystoi>=0.4,<0.5"],
        "flash": ["flash-attn>=2.8,<3"],
        "onnx": [
            "onnx>=1.17,<2",
            "onnxruntime>=1.20,<2",
            "onnxscript>=0.5,<1",
        ],
        "dev": [
            "espeakng-loader>=0.2.4,<0.3",
            "gradio>=6,<7",
            "matplotlib>=3.8,<4",
            "mir_eval>=0.7,<0.9",
            "onnx>=1.17,<2",
            "onnxruntime>=1.20,<2",
            "onnxscript>=0.5,<1",
            "pystoi>=0.4,<0.5",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.14,<0.18",
            "selenium>=4.20,<5",
            "setuptools>=77",
        ],
    },
    entry_points={
        "console_scripts": ["flashformer = speechbrain_flashformer.cli:main"]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
)
