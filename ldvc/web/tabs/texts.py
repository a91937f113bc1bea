"""The sentences of the Attention, Routing, Space and Compare tabs. Markup is ours; nothing of a visitor's is in here."""

DECODER_TITLES = {
    "clip": "Plain CLIP similarity",
    "zegclip": "ZegCLIP’s decoder",
    "ldvc_without_lcsa": "LDVC without LCSA",
    "ldvc": "LDVC with LCSA",
    "ldvc_lcsa_off": "LCSA switched off",
}
DECODER_MISSING = "This checkpoint has no such decoder."
INTERVENTION = "intervention"

# ---- attention ----

ATTENTION_EMPTY = "Segment a photo first: here you will see which share of each patch’s attention goes to which name."
ATTENTION_TITLE = "Which name does each patch attend to?"
ATTENTION_HELP = (
    "Every patch spreads its attention over the class names; the shares add up to 1, and bright means much. The scores behind "
    "the last layer’s map are those from which the masks are read. Down: the names. Across: three decoders."
)
ATTENTION_COLUMNS = {
    "ldvc": "patches ask look-alikes, then names",
    "ldvc_without_lcsa": "patches ask names only",
    "zegclip": "names ask patches",
    "ldvc_lcsa_off": "the weights of the first column, LCSA left out now",
}
ATTENTION_LAYER = "Layer"
ATTENTION_HEAD = "Head"
ATTENTION_MEAN = "mean"
ATTENTION_NAMES = "Names shown"
ATTENTION_NAMES_INFO = "Eight at a time."
ATTENTION_RESCALE = "Rescale"
ATTENTION_RESCALE_INFO = "From the lowest to the highest value shown."
ATTENTION_OFF = "Switch LCSA off"
ATTENTION_OFF_INFO = "In the same weights: an intervention, never trained so."
ATTENTION_SCALE = "Share of attention, one fixed scale from 0 to 1 for all maps"
ATTENTION_SCALE_RESCALED = "Share of attention, rescaled to the lowest and highest value shown: not 0 to 1"
ATTENTION_ONE = "With one name and no company, attention is 1 everywhere. Add company or a second name to see where it goes."
ATTENTION_SHARES = "inside its mask {inside}, outside {outside}"
COMPANY = "Company"
COMPANY_HELP = "Words that share the attention with a single name; they are not part of the overlay."
COMPANY_INFO = "A few words for stuff, asked beside a single name."
ATTENTION_EXACTLY = "What exactly is drawn"
ATTENTION_EXACTLY_TEXT = (
    "<p><b>The maps.</b> Drawn is the softmax over the names of the scores q·k / √d<sub>head</sub> of the chosen layer, of one "
    "head or of the mean score of all heads. The masks are read from the last layer’s mean scores, for all three decoders "
    "alike.</p>"
    "<p><b>What differs.</b> In LDVC patches are the queries and names the keys. In ZegCLIP’s decoder names are the queries "
    "and patches the keys; its own softmax, in the layers before the last, runs over the patches.</p>"
    "<p><b>Inside and outside.</b> The mean of a map over the pixels to which its own decoder gives that name, “none of "
    "these” included, and over all others.</p>"
    "<p><b>Company.</b> The softmax over one name is 1 everywhere. So a single name is asked together with a few words for "
    "stuff, whose shares are added into one map.</p>"
    "<p><b>Without LCSA</b> is a decoder of its own, trained without the sub-layer: the paper’s ablation. "
    "<b>LCSA switched off</b> takes the trained LDVC and leaves the sub-layer out at inference: an intervention, which "
    "shows what the other layers do by themselves and not what training without LCSA would have given.</p>"
    "<p>Synonyms of one name share a map: their shares are added.</p>"
)
SLIDER_TITLE = "Lay two decoders over each other"
SLIDER_HELP = "Drag the line, or move it with the arrow keys."
SLIDER_NAME = "Attention to"
SLIDER_LEFT = "Left"
SLIDER_RIGHT = "Right"
SLIDER_LABEL = "Where the line between the two maps stands, in percent from the left"

# ---- routing ----

ROUTING_EMPTY = "Segment a photo first: then click a spot of it to see which regions its patch attends to."
ROUTING_TITLE = "Which regions does this patch attend to?"
ROUTING_HELP = (
    "Local-consensus self-attention, step by step. Click a spot of the photo, or focus it and use the arrow keys."
)
ROUTING_STAGE = (
    "The photo with the routing of one patch. Arrow keys move by one patch, with Shift by one region, Home and End to the "
    "ends of the row."
)
ROUTING_MISSING = "This checkpoint has no LCSA, so there is no routing to show."
ROUTING_ROW = "Row"
ROUTING_COLUMN = "Column"
ROUTING_STEPS = ("Route", "Attend to regions", "Attend to names")
ROUTING_STEP_HELP = (
    "The patch’s region (dashed) compares its mean query with the mean key of every region. The {k} with the highest "
    "affinity are chosen; the patch attends to no other.",
    "The patch attends to single patches inside those regions only. Shares add up to 100&#8239;%.",
    "With what it gathered, the patch attends to the class names. Softmax over the names, layer {layer}, {head}.",
)
ROUTING_MAP = "Affinity of all {total} regions"
ROUTING_SCALE = "Share of token attention, {head}"

# ---- space ----

SPACE_EMPTY = "Segment a photo first: here you will see which of the two moved, the patches or the names."
SPACE_TITLE = "Which of the two moved?"
SPACE_HELP = (
    "Dots are patches, diamonds are class names. LDVC holds the names still and moves the patches; ZegCLIP holds the patches "
    "still and moves the names. Drag from before to after."
)
SPACE_SLIDER = "From before the decoder (0) to after it (100)"
SPACE_BEFORE = "before the decoder"
SPACE_AFTER = "after"
DRAWING = "One moment: this is being computed for your photo and names."
SPACE_LABELLED = (
    "Of the {all} names, the {written} that most patches got are written; point at a diamond to read its name."
)
SPACE_PLAY = "Play"
SPACE_MOVED = {"patches": "the patches moved", "names": "the names moved"}
SPACE_TABLE = ("", "names moved by", "patches moved by", "patch and its class: before → after")
SPACE_EXACTLY = "How this was measured"
SPACE_EXACTLY_TEXT = (
    "<p><b>Moved by</b> is the mean of 1 − cos between what went into the decoder and what came out, over all names or all "
    "patches, in CLIP’s full joint space and not in the plane. Before is after the text adapter: the names as this "
    "photo’s decoder gets them. After is what enters the last cross-attention, from whose scores the masks are read. 0 means "
    "bit for bit the same.</p>"
    "<p><b>Patch and its class</b> is the mean cosine of a patch and the class that this decoder gave it, both before or "
    "both after. It may fall: for the mask it only matters that the right name comes out ahead of the others, and its scores "
    "come after a query and a key projection, which are left out here.</p>"
    "<p><b>The plane</b> is fitted once to the points of both decoders, before and after together, each counting once. "
    "Colours are the classes that a decoder gave its patches. Two names that look close here may be far apart in the "
    "dimensions that the plane does not show.</p>"
)

# ---- compare ----

COMPARE_EMPTY = "Segment a photo first: here four ways of doing it will stand side by side."
COMPARE_TITLE = "One photo, four decoders"
COMPARE_HELP = "Same photo, same names, same colours. Names that the model never saw a mask of are marked."
COMPARE_DECODERS = {
    "clip": "No decoder: cosine of patch and name in the CLIP beneath.",
    "zegclip": "Names are queries and move; patches stay.",
    "ldvc_without_lcsa": "Patches attend to the names and move, each on its own.",
    "ldvc": "Patches agree with look-alikes, then attend to the names and move.",
}
COMPARE_THRESHOLDS = "“None of these” is at each decoder’s own threshold."
COMPARE_DIFFERS = "Another name than LDVC with LCSA on {share} of the photo."
COMPARE_FOOTNOTE = (
    "Marked and striped: no mask of this name was ever shown. All four stand on one CLIP; lite’s learned from the same masks."
)
NONE = "none of these"

# ---- programs ----

NO_SUCH_LAYER = "There is no layer {layer}; ask for 1 to {layers}, or 0 for the last."
NO_SUCH_HEAD = "There is no head {head}; ask for 1 to {heads}, or 0 for the mean of all."
NO_SUCH_PATCH = "There is no patch in row {row}, column {column}; the photo has {rows} rows and {columns} columns."
NO_WHOLE_NUMBER = "{name} is a whole number, not “{value}”."
NOT_ASKED_FOR = "“{name}” is not among the names; ask about one of them."
