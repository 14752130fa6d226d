"""The names that records, turns and roles go by, and what a key that is not text means.

A name is looked up in lower case, its blanks and hyphens as underscores (`fold`). What no table
here knows and no reader used is counted and said: "columns not used" (`formats.py`).
"""

from __future__ import annotations

from typing import Any

from vicuna.data.conversation import Role
from vicuna.data.records.reasons import DUPLICATE_KEY, Note


def names(words: str) -> tuple[str, ...]:
    """A table of words that reads as a line."""
    return tuple(words.split())


TURN_LISTS = ("conversations", "conversation", "messages")
# These names are used for other things too: only a list that looks like turns counts.
OTHER_TURN_LISTS = names(
    "dialog dialogue dialogs dialogues items turns chat chat_messages contents chat_history "
    "conversation_history 对话 对话内容 会话 多轮对话"
)
ALL_TURN_LISTS = frozenset((*TURN_LISTS, *OTHER_TURN_LISTS))
SPEAKERS = names("from role speaker sender author 角色 说话人")
WORDS = names("value content text message utterance parts 内容 文本")
SYSTEMS = names(
    "system system_prompt system_message systemprompt sys_prompt meta_instruction "
    "systeminstruction system_instruction 系统 系统提示 系统提示词"
)
MATERIAL = ("input", "context")
PAIRS = tuple(
    (question, answer)
    for question, _, answer in (
        couple.partition("/")
        for couple in names(
            "prompt/response prompt/completion question/answer query/response query/answer "
            "instruction/response instruction/completion input/output context/target input/target "
            "source/target ask/answer q/a human/assistant user/assistant user/bot human/gpt "
            "human/bot question/response query/output prompt/output prompt/answer input/response "
            "input/answer input/content inputs/targets inputs/outputs problem/solution "
            "problem/answer question/solution question/correct_answer question/best_answer src/tgt "
            "問題/答案 問題/回答 提問/回答 指令/輸出 輸入/輸出 問/答 "
            "问题/答案 问题/回答 提问/回答 指令/输出 输入/输出 问/答"
        )
    )
)
QUESTIONS = tuple(dict.fromkeys(q for q, _ in PAIRS))
ANSWERS = tuple(dict.fromkeys(a for _, a in PAIRS if a != "content"))
# A record with one of these and no answer is a pair without an answer rather than a riddle.
PLAIN_QUESTIONS = names("prompt question query 问题 指令")

# Preferences: the better answer, and the worse one that is never taught.
CHOSEN = names(
    "chosen chosen_response response_chosen chosen_answer preferred preferred_response "
    "preferred_output accepted accepted_response good_response good_answer better_response "
    "positive_response winner_response response_j 优选 优选回答 更优回答"
)
REJECTED = names(
    "rejected rejected_response response_rejected rejected_answer rejected_messages "
    "rejected_output non_preferred_output dispreferred bad_response bad_answer worse_response "
    "negative_response loser_response response_k 拒绝 拒选回答 较差回答"
)

# What the words of an answer were thought up with.
THOUGHTS = names(
    "reasoning_content reasoning thinking thought thoughts think cot complex_cot chain_of_thought "
    "reasoning_text reasoning_trace reasoning_process reasoning_details thinking_content "
    "thinking_text thinking_process think_content inner_thoughts inner_thought scratchpad "
    "deepseek_reasoning model_reasoning assistant_reasoning 思考 思考过程 思维链 推理 推理过程"
)
# What a text model cannot see or hear.
MEDIA = names(
    "image images image_url image_urls image_path image_paths image_file img imgs picture pictures "
    "photo photos audio audios audio_path audio_url speech video videos video_path video_url "
    "pixel_values frames attachments 图片 图像 音频 视频 附件"
)
TOOLS = names(
    "tools tool_calls tool_call function_call function_calls functions available_tools tool_list "
    "tools_list api_list tool_definitions function_definitions plugins 工具 工具列表"
)
# Whether an answer is in the loss: true says yes ...
LEARNED = names(
    "weight loss_weight sample_weight turn_weight weights loss_weights train trainable training "
    "do_train is_train is_trained to_train train_on train_on_turn train_turn train_this "
    "in_training loss loss_scale loss_mask train_mask in_loss with_loss has_loss need_loss "
    "use_loss enable_loss compute_loss calculate_loss calc_loss output_with_loss supervise "
    "supervised learn learnable use_for_training include_in_loss 权重 训练"
)
# Parts of an answer that are in the loss, by their place in it: more than a turn can carry.
PARTIAL = names("train_detail training_detail no_loss_spans loss_spans train_spans token_weights")
# ... or no.
MASKED = names(
    "mask masked is_masked mask_loss masked_loss ignore ignored ignore_loss is_ignored no_loss "
    "no_train skip skip_loss skip_training skip_train exclude excluded exclude_from_loss "
    "exclude_from_training freeze frozen not_train untrained is_context context_only"
)
# Whether an answer is a good one.
GOOD = names(
    "label kto_tag kto_label is_good good is_correct correct is_right is_chosen is_preferred "
    "is_accepted is_positive positive is_valid valid is_safe safe approved is_approved passed "
    "thumbs_up upvoted is_helpful helpful review_result feedback 标签 是否正确 正确"
)
BAD = names(
    "is_bad bad is_wrong wrong incorrect is_incorrect is_rejected is_negative is_toxic toxic "
    "is_harmful harmful is_unsafe unsafe thumbs_down downvoted flagged deleted is_deleted "
    "is_invalid invalid 是否错误 错误"
)
# A record's place among answers to one question: smaller is better, or greater.
RANKS = names("rank ranking 排名 名次")
SCORES = names("score overall_score reward rating quality_score preference_score 得分 分数 评分")

OPTIONS = names(
    "options option choices choice candidates answer_choices alternatives endings answer_options "
    "选项 备选答案 候选"
)
OPTION_ANSWERS = names("answer_idx answer_index answerkey answer_key answer_id correct_option cop")

# They say where a record comes from, not what it means.
HARMLESS = frozenset(
    names(
        "id _id idx index row_id row_idx uid uuid guid qid pid sid sample_id record_id question_id "
        "prompt_id conversation_id conv_id dialog_id dialogue_id chat_id message_id unique_id "
        "__index_level_0__ hash md5 sha1 sha256 source source_id data_source dataset dataset_name "
        "origin url link license num_turns n_turns turn_count num_tokens length "
        "编号 序号 来源 出处 链接"
    )
)

_USERS = names(
    "human user prompter questioner usr customer client 问 用户 人类 提问 提问者 客户 顾客 患者"
)
_ASSISTANTS = names(
    "gpt assistant bot model chatgpt gpt4 gpt-4 ai chatbot claude "
    "答 助手 助理 机器人 模型 回答 客服"
)
ROLES: dict[str, Role] = {
    **dict.fromkeys(_USERS, "user"),
    **dict.fromkeys(_ASSISTANTS, "assistant"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
}
# Turns that hold what the next answer was thought up with.
THOUGHT_ROLES = frozenset(names("thought thoughts thinking reasoning think analysis 思考 推理"))
TOOL_ROLES = frozenset(
    names(
        "tool tools function function_call function_response tool_call tool_response observation "
        "tool_result function_result ipython environment 工具"
    )
)

_SHAPES = names(
    "history instruction id generation_parameter info mapping current_node plain_text prefix "
    "channel recipient"
)
KNOWN = frozenset(
    (*ALL_TURN_LISTS, *SPEAKERS, *WORDS, *SYSTEMS, *MATERIAL, *QUESTIONS, *ANSWERS, *CHOSEN)
    + (*REJECTED, *THOUGHTS, *MEDIA, *TOOLS, *LEARNED, *MASKED, *GOOD, *BAD, *RANKS, *SCORES)
    + (*OPTIONS, *OPTION_ANSWERS, *PARTIAL, *_SHAPES)
)
MEANINGFUL = frozenset(
    (*SYSTEMS, *THOUGHTS, *MEDIA, *TOOLS, *LEARNED, *MASKED, *GOOD, *BAD, *RANKS, *SCORES)
    + (*CHOSEN, *REJECTED, *PARTIAL)
)


def fold(record: dict[str, Any], note: Note) -> tuple[dict[str, Any], dict[str, str]]:
    """The record under the names that are known here, and how it spells those that differ."""
    if KNOWN.issuperset(record):
        return record, {}
    folded: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for key, value in record.items():
        key = str(key)
        lower = key.strip().lower()
        if lower not in KNOWN and (under := lower.replace(" ", "_").replace("-", "_")) in KNOWN:
            lower = under
        if lower in folded and lower in KNOWN:
            note(lower, DUPLICATE_KEY, "repaired")
        folded[lower] = value
        if lower != key:
            spelt[lower] = key.strip()
    return folded, spelt


def first(record: dict[str, Any], wanted: tuple[str, ...]) -> str | None:
    """The first of the names that the record has."""
    for name in wanted:
        if name in record:
            return name
    return None


def empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, no text, an empty list or object, or their text."""
    if value is None or value != value:
        return True
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING
    return isinstance(value, (list, dict, tuple)) and not value


_NOTHING = frozenset(("", "[]", "{}", "null", "none", "nan"))
