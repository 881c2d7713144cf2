"""Restrict the yaml of an untrusted model to what ``flashformer pack`` writes.

HyperPyYAML can call any code, include files and read attributes. A packed model
needs none of this. Its yaml is checked twice: as a tree of nodes, before
anything is constructed, and again when the objects are constructed.
"""

import re

from ruamel.yaml import Loader
from ruamel.yaml.nodes import MappingNode

from speechbrain_flashformer.nnet.separator import MODULES

PRETRAINER = "speechbrain.utils.parameter_transfer.Pretrainer"
# Replaces the Pretrainer where SpeechBrain is not imported.
LOADABLES = "types.SimpleNamespace"
DUAL_PATH = "speechbrain.lobes.models.dual_path"
PLAIN_PATH = "speechbrain_flashformer.nnet.plain"
RESEPFORMER = "speechbrain.lobes.models.resepformer"
# Allowed classes: networks that only build layers from their arguments.
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
# Tag -> tag of an equivalent that needs only torch.
WITHOUT_SPEECHBRAIN = {
    f"!new:{DUAL_PATH}.Encoder": f"!new:{PLAIN_PATH}.Encoder",
    f"!new:{DUAL_PATH}.Decoder": f"!new:{PLAIN_PATH}.Decoder",
    f"!new:{PRETRAINER}": f"!new:{LOADABLES}",
}
PLAIN = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
# HyperPyYAML parses the inside of "(...)" as yaml again, with all tags. So only
# numbers are allowed there.
TUPLE = re.compile(r"\([-+.,\de\s]*\)")


def untrusted(root):
    """Find what ``flashformer pack`` never writes in the yaml of a model.

    Arguments
    ---------
    root : ruamel.yaml.nodes.MappingNode
        The composed yaml.

    Returns
    -------
    list of str
        Anchors, tags and values that are not allowed.

    Example
    -------
    >>> from ruamel.yaml import YAML
    >>> root = YAML().compose("rate: 8000\\nnet: !apply:os.system [ls]")
    >>> untrusted(root)
    ['!apply:os.system']
    """
    # With anchors, a short yaml can expand to unbounded size.
    anchors = [f"&{node.anchor}" for node in _nodes(root) if node.anchor]
    return anchors + _odd_nodes(root)


class PackedLoader(Loader):
    """Constructs only what ``flashformer pack`` writes.

    HyperPyYAML resolves the references and writes a new yaml before it
    constructs objects. This loader checks that yaml.

    Raises
    ------
    ValueError
        While loading, when the yaml contains anything else.
    """

    def get_single_data(self):
        """Check the document of the stream, and construct it."""
        root = self.get_single_node()
        if odd := _odd_nodes(root):
            raise ValueError(refusal(odd, "it"))
        return self.construct_document(root)


def refusal(odd, path):
    """Error message for a yaml that needs trust.

    Arguments
    ---------
    odd : list of str
        As from ``untrusted``, not empty.
    path : str or Path
        The yaml.

    Returns
    -------
    str
    """
    return (
        f"{path} asks for {odd[0][:99]!r}, which 'flashformer pack' never "
        "writes and which may run code: if you trust its author, say --trust "
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
    """Find the tags and values that are not allowed."""
    odd = []
    for node in _nodes(root):
        tag, value = str(node.tag), node.value
        text = value if isinstance(value, str) else ""
        if tag.startswith("!new:"):
            fine = tag.removeprefix("!new:") in CLASSES
            if tag in (f"!new:{PRETRAINER}", f"!new:{LOADABLES}"):
                # Paths would fetch files, and hooks would call code.
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
