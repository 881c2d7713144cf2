"""What the yaml of a model may ask for without being trusted.

HyperPyYAML can call anything, include files and read attributes. A packed
model needs none of it: its yaml is checked as a tree of nodes, of which
nothing is constructed, and once more when it is.
"""

import re

from ruamel.yaml import Loader
from ruamel.yaml.nodes import MappingNode

from speechbrain_flashformer.nnet.separator import MODULES

PRETRAINER = "speechbrain.utils.parameter_transfer.Pretrainer"
# Stands for it where SpeechBrain is not imported.
LOADABLES = "types.SimpleNamespace"
DUAL_PATH = "speechbrain.lobes.models.dual_path"
PLAIN_PATH = "speechbrain_flashformer.nnet.plain"
RESEPFORMER = "speechbrain.lobes.models.resepformer"
# Networks that do nothing with their arguments but build layers.
CLASSES = {
    PRETRAINER,
    LOADABLES,
    "speechbrain_flashformer.FlashFormer",
    "speechbrain_flashformer.nnet.flashformer.FlashFormer",
    "speechbrain_flashformer.nnet.filterbank.Encoder",
    "speechbrain_flashformer.nnet.filterbank.Decoder",
    f"{PLAIN_PATH}.Encoder",
    f"{PLAIN_PATH}.Decoder",
    f"{DUAL_PATH}.Encoder",
    f"{DUAL_PATH}.Decoder",
    f"{DUAL_PATH}.Dual_Path_Model",
    f"{DUAL_PATH}.SBTransformerBlock",
    f"{DUAL_PATH}.SBRNNBlock",
    f"{DUAL_PATH}.DPTNetBlock",
    "speechbrain.lobes.models.conv_tasnet.MaskNet",
    f"{RESEPFORMER}.ResourceEfficientSeparator",
    f"{RESEPFORMER}.SBTransformerBlock_wnormandskip",
    f"{RESEPFORMER}.SBRNNBlock",
    f"{RESEPFORMER}.SegLSTM",
    f"{RESEPFORMER}.MemLSTM",
}
REFERENCES = {f"<{name}>" for name in (*MODULES, "modules")}
# Tag -> what does the same on torch alone.
WITHOUT_SPEECHBRAIN = {
    f"!new:{DUAL_PATH}.Encoder": f"!new:{PLAIN_PATH}.Encoder",
    f"!new:{DUAL_PATH}.Decoder": f"!new:{PLAIN_PATH}.Decoder",
    f"!new:{PRETRAINER}": f"!new:{LOADABLES}",
}
PLAIN = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
# HyperPyYAML reads the inside of "(...)" as yaml again, with every tag.
TUPLE = re.compile(r"\([-+.,\de\s]*\)")


def untrusted(root):
    """What of a model's yaml ``flashformer pack`` never writes.

    Arguments
    ---------
    root : ruamel.yaml.nodes.MappingNode
        The yaml as it was composed.

    Returns
    -------
    list of str

    Example
    -------
    >>> from ruamel.yaml import YAML
    >>> root = YAML().compose("rate: 8000\\nnet: !apply:os.system [ls]")
    >>> untrusted(root)
    ['!apply:os.system']
    """
    # Nodes under several names can be of a size without bound.
    anchors = [f"&{node.anchor}" for node in _nodes(root) if node.anchor]
    return anchors + _odd_nodes(root)


class PackedLoader(Loader):
    """Constructs only what ``flashformer pack`` writes.

    HyperPyYAML writes the yaml anew, with references resolved, before it
    constructs: what is checked here is what is constructed.
    """

    def get_single_data(self):
        """Construct the one document of the stream."""
        root = self.get_single_node()
        if odd := _odd_nodes(root):
            raise ValueError(refusal(odd, "it"))
        return self.construct_document(root)


def refusal(odd, path):
    """Why a yaml is not built, and what to do about it."""
    return (
        f"{path} asks for {odd[0][:99]!r}, which 'flashformer pack' never "
        "writes and which may run code: if you trust who made it, say --trust "
        "(in Python trust=True)"
    )


def _nodes(root):
    """The nodes of a yaml tree, each once."""
    seen, rest = set(), [root]
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, MappingNode):
            rest += [part for pair in node.value for part in pair]
        elif isinstance(node.value, list):
            rest += node.value


def _odd_nodes(root):
    """Tags, and values without a tag, that are not allowed."""
    odd = []
    for node in _nodes(root):
        tag, value = str(node.tag), node.value
        text = value if isinstance(value, str) else ""
        if tag.startswith("!new:"):
            fine = tag.removeprefix("!new:") in CLASSES
            if tag in (f"!new:{PRETRAINER}", f"!new:{LOADABLES}"):
                # Its paths and hooks would fetch and call.
                keys = isinstance(node, MappingNode) and [
                    key.value for key, _ in value
                ]
                fine = keys == ["loadables"]
        elif tag == "!ref":
            fine = value in REFERENCES
        elif text.lstrip().startswith("("):
            fine = tag in PLAIN | {"!tuple"} and TUPLE.fullmatch(text)
        else:
            fine = tag in PLAIN
        if not fine:
            odd.append(f"{'' if tag in PLAIN else tag} {text}".strip())
    return odd
