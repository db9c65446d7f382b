"""Plain mathematics, one idea a file: the readable twins of what lf/kernels does fast. Like a device, they have a table: `devices.op_table(ops)`."""

OPS = {
    "adamw_update": "lf.ops.adamw.adamw_update",
    "attention": "lf.ops.attention.attention",
    "grouped_linear": "lf.ops.grouped.grouped_linear",
    "momentum_update": "lf.ops.muon.momentum_update",
    "permute": "lf.ops.permute.permute",
    "rms_norm": "lf.ops.norm.rms_norm",
    "rope": "lf.ops.rope.rope",
    "swiglu": "lf.ops.swiglu.swiglu",
    "unpermute": "lf.ops.permute.unpermute",
}
