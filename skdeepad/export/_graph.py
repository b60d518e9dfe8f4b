"""One ONNX graph, from pixels of any size to scores."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._parts import ExportError, Part, PValues, Step

OPSET = 18  # the first whose Resize is antialiased
IR_VERSION = 9
FLOAT, DOUBLE = 1, 11  # of onnx.TensorProto


class Whole(Step):
    """Resized images -> all outputs, in the order of `names`."""

    def __init__(self, part: Part, held_out: Any) -> None:
        super().__init__()
        self.part = part
        self.p_values = None if held_out is None else PValues(held_out)
        self.names: list[str] = []

    def forward(self, threshold: Tensor, *resized: Tensor) -> tuple[Tensor, ...]:
        """Give the outputs."""
        found = self.part(dict(zip(self.part.sizes, resized, strict=True)))
        decision = found["score"] - threshold
        found["decision"] = decision
        found["label"] = 2 * (decision >= 0).long() - 1
        if self.p_values is not None:
            found["p_value"] = self.p_values(found["score"])
        self.names = list(found)
        return tuple(found.values())


def make_graph(part: Part, threshold: float, held_out: Any, mask: Any) -> Any:
    """Make the ONNX model; the graph is compared with what torch computes."""
    import onnx

    whole = Whole(part, held_out).eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, part.channels, *s, generator=generator) for s in part.sizes]
    at = torch.tensor(threshold, dtype=torch.float64)
    with torch.no_grad():
        expected = whole(at, *images)
        resized = [f"resized{i}" for i in range(len(images))]
        model = onnx.load_from_string(_traced(whole, (at, *images), resized))
    outputs = dict(zip(whole.names, expected, strict=True))
    _compare(
        model, outputs, {"threshold": at, **dict(zip(resized, images, strict=True))}
    )
    _put_pixels_before(model.graph, part, resized)
    if "map" in outputs:
        _bring_maps_to_images(model.graph, mask)
    _set_defaults(model.graph, threshold)
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model, {name: tuple(value.shape[1:]) for name, value in outputs.items()}


def _traced(whole: Whole, inputs: tuple[Tensor, ...], resized: list[str]) -> bytes:
    # torch's newer exporter takes twenty times as long, and needs onnxscript
    file: Any = io.BytesIO()  # torch's annotation knows paths only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of this exporter's age
        try:
            torch.onnx.export(
                whole,
                inputs,
                file,
                input_names=["threshold", *resized],
                output_names=whole.names,
                dynamic_axes={name: {0: "n"} for name in (*resized, *whole.names)},
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # torch.onnx has many classes, some of them private
            raise ExportError(
                f"torch cannot export this network to ONNX: {str(error)[:300]}"
            ) from error
    return file.getvalue()


def _compare(model: Any, expected: dict[str, Tensor], feeds: dict[str, Tensor]) -> None:
    """Raise an error unless ONNX Runtime computes what torch does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        values = {i.name: feeds[i.name].numpy() for i in session.get_inputs()}
        (found,) = session.run(["score"], values)
    except Exception as error:  # of ONNX Runtime's own classes
        raise ExportError(
            f"ONNX Runtime cannot run the graph of this network: {str(error)[:300]}"
        ) from error
    wanted = expected["score"].numpy()
    if not np.allclose(found, wanted, rtol=1e-3, atol=1e-6 * np.abs(wanted).max()):
        raise ExportError(
            f"The graph scores otherwise than the detector ({found[0]:g} in place of "
            f"{wanted[0]:g}): the network decides by what it computes, which graphs do "
            "not. Use another backbone."
        )


def _put_pixels_before(graph: Any, part: Part, resized: list[str]) -> None:
    """Put division by white, the layout and the resize before the network."""
    from onnx import helper

    nodes = [
        helper.make_node("Div", ["images", "white"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["first"], perm=[0, 3, 1, 2]),
    ]
    _constant(graph, "channels", np.array([1, part.channels, 1, 1]))
    for name, size in zip(resized, part.sizes, strict=True):
        _constant(graph, f"{name}_size", np.array(size))
        nodes += [
            helper.make_node(
                "Resize",
                ["first", "", "", f"{name}_size"],
                [f"{name}_narrow"],
                axes=[2, 3],
                mode="linear",
                antialias=1,
                exclude_outside=1,
                coordinate_transformation_mode="half_pixel",
            ),
            # grey is repeated
            helper.make_node("Expand", [f"{name}_narrow", "channels"], [name]),
        ]
    _prepend(graph, nodes)
    kept = [i for i in graph.input if i.name not in resized]
    del graph.input[:]
    shape = ["n", "height", "width", "channels"]
    graph.input.append(helper.make_tensor_value_info("images", FLOAT, shape))
    graph.input.append(helper.make_tensor_value_info("white", FLOAT, []))
    graph.input.extend(kept)


def _bring_maps_to_images(graph: Any, mask: Any) -> None:
    """Resize maps to the images' size, and make them 0 outside a mask."""
    from onnx import helper

    for node in graph.node:
        node.output[:] = ["map_at_network" if o == "map" else o for o in node.output]
        node.input[:] = ["map_at_network" if i == "map" else i for i in node.input]
    _constant(graph, "one", np.array([1]))
    mapped = "map" if mask is None else "map_unmasked"
    nodes = [
        helper.make_node("Shape", ["images"], ["images_size"], start=1, end=3),
        helper.make_node("Unsqueeze", ["map_at_network", "one"], ["map_channel"]),
        helper.make_node(
            "Resize",
            ["map_channel", "", "", "images_size"],
            ["map_resized"],
            axes=[2, 3],
            mode="linear",
            antialias=1,
            exclude_outside=1,
            coordinate_transformation_mode="half_pixel",
        ),
        helper.make_node("Squeeze", ["map_resized", "one"], [mapped]),
    ]
    if mask is not None:
        _constant(graph, "mask", np.asarray(mask, np.float32)[None])
        nodes += [
            helper.make_node(
                "Resize",
                ["mask", "", "", "images_size"],
                ["mask_resized"],
                axes=[1, 2],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
            helper.make_node("Mul", [mapped, "mask_resized"], ["map"]),
        ]
    graph.node.extend(nodes)
    for output in graph.output:
        if output.name == "map":
            shape = ["n", "height", "width"]
            output.CopyFrom(helper.make_tensor_value_info("map", FLOAT, shape))


def _set_defaults(graph: Any, threshold: float) -> None:
    """Give the threshold and white their values where a caller gives none."""
    from onnx import numpy_helper

    for name, value in (("threshold", threshold), ("white", np.float32(255))):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))


def _constant(graph: Any, name: str, value: Any) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(value, name))


def _prepend(graph: Any, nodes: list[Any]) -> None:
    later = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *later])
