"""What keeps an operator from the goal of a bar, on the machines that miss it; for pages."""

NEAR_THE_ROOF = (
    "most of its work is matrix products, which already run near the measured roof of the "
    "machine (see the share in the table below), and exponentials are much of the rest; the goal "
    "would need products above the roof."
)
LITTLE_IN_BFLOAT16 = (
    "matrix products are less than half of its time in bfloat16; exponentials, gathered rows and "
    "sums in float32 take as long as in float32."
)
PEER_ON_THE_SAME_TILES = (
    "PyTorch's attention uses the same matrix tiles of the processor, at about half of the roof "
    "(see the share in the table below), so the goal would be at the roof itself."
)
FEW_ROWS_OF_A_BRANCH = (
    "a branch has few rows: they fill its last vectors only in part, and all its keys and values "
    "are read for them."
)
GATHERED_ROWS = (
    "the rows of a chapter are gathered, and the softmax of a row is merged from its chapters; "
    "attention to the whole bank needs neither."
)
MORE_THAN_THE_STATE = (
    "a step also pays for its call, checks and results, and reads the rows of the open chunk."
)
SAME_PRODUCTS = (
    "nine tenths of our step are matrix products and attention, which run at nearly the rate of "
    "the machine's float32 products; Llama has the same products with the weights."
)
SAME_LOOP = (
    "about half of the time of a token is one read of all weights, which both models need; the "
    "loop of transformers' generate() is the same for both as well."
)
SAME_PROMPT = f"both models read the prompt by the same matrix products; {SAME_LOOP}"
