/* yaml.c - the subset of YAML that cloud-config files are written in.
 *
 * Block mappings and sequences, flow sequences and mappings, plain, 'single' and "double" quoted scalars
 * (with JSON's escapes, so any JSON string is read as it should be), literal | and folded > blocks,
 * comments. No anchors, tags, or several documents. A line that makes no sense is reported and skipped:
 * a typing error in one key must not cost the user the login that another key would have given.
 * Nodes are never freed: the file is read once, by a process that then goes on to other things.
 */
#include "micro.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *at; /* the next character to read; always the start of a line between block nodes */

static struct node *new_node(enum kind kind)
{
    struct node *node = calloc(1, sizeof *node);
    if (!node)
        abort();
    node->kind = kind;
    return node;
}

static struct node *new_scalar(const char *text, size_t length)
{
    struct node *node = new_node(SCALAR);
    node->text = strndup(text, length);
    return node;
}

static void append(struct node *parent, struct node *child)
{
    struct node **last = &parent->child;
    while (*last)
        last = &(*last)->next;
    *last = child;
}

/* --- lines ------------------------------------------------------------------------------------ */

static size_t indent_of(const char *line)
{
    return strspn(line, " ");
}

static const char *end_of(const char *line)
{
    return line + strcspn(line, "\n");
}

static const char *after(const char *line)
{
    const char *end = end_of(line);
    return *end ? end + 1 : end;
}

static bool is_empty(const char *line)
{
    const char *text = line + strspn(line, " \t\r");
    return *text == '\n' || *text == 0 || *text == '#';
}

static bool is_dash(const char *text)
{
    return text[0] == '-' && (text[1] == 0 || strchr(" \t\r\n", text[1]));
}

static void skip_empty_lines(void)
{
    while (*at && (is_empty(at) || strncmp(at, "---", 3) == 0))
        at = after(at);
}

/* A plain scalar's end on this line: before " #" and trailing blanks. */
static const char *plain_end(const char *text)
{
    const char *end = end_of(text);
    for (const char *mark = text; mark < end; mark++)
        if (*mark == '#' && mark > text && (mark[-1] == ' ' || mark[-1] == '\t')) {
            end = mark;
            break;
        }
    while (end > text && isspace((unsigned char)end[-1]))
        end--;
    return end;
}

/* --- quoted scalars --------------------------------------------------------------------------- */

static char *put_utf8(char *out, unsigned long code)
{
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xc0 | code >> 6);
        *out++ = (char)(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        *out++ = (char)(0xe0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 0x3f));
        *out++ = (char)(0x80 | (code & 0x3f));
    } else {
        *out++ = (char)(0xf0 | code >> 18);
        *out++ = (char)(0x80 | (code >> 12 & 0x3f));
        *out++ = (char)(0x80 | (code >> 6 & 0x3f));
        *out++ = (char)(0x80 | (code & 0x3f));
    }
    return out;
}

static unsigned long take_hex(const char **from, int digits)
{
    unsigned long value = 0;
    while (digits-- > 0 && isxdigit((unsigned char)**from)) {
        char digit = (char)tolower((unsigned char)*(*from)++);
        value = value * 16 + (unsigned long)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return value;
}

static char *put_escape(char *out, const char **from)
{
    static const char names[] = "0abtnvfre \"/\\";
    static const char values[] = "\0\a\b\t\n\v\f\r\033 \"/\\";
    char name = *(*from)++;
    const char *known = name ? strchr(names, name) : NULL;
    unsigned long code;
    if (known) {
        *out++ = values[known - names];
        return out;
    }
    switch (name) {
    case 'x':
        return put_utf8(out, take_hex(from, 2));
    case 'U':
        return put_utf8(out, take_hex(from, 8) & 0x1fffff);
    case 'u':
        code = take_hex(from, 4);
        if (code >= 0xd800 && code < 0xdc00 && (*from)[0] == '\\' && (*from)[1] == 'u') {
            *from += 2; /* JSON writes what lies beyond U+FFFF as a surrogate pair */
            code = 0x10000 + ((code - 0xd800) << 10) + ((take_hex(from, 4) - 0xdc00) & 0x3ff);
        }
        return put_utf8(out, code);
    case '\n':
        *from += strspn(*from, " \t"); /* an escaped line end joins the lines */
        return out;
    default:
        *out++ = name;
        return out;
    }
}

/* `*from` is at the opening quote and ends behind the closing one. */
static struct node *take_quoted(const char **from)
{
    const char *text = *from;
    char quote = *text++;
    char *start = malloc(strlen(text) + 1), *out = start; /* no escape grows */
    while (start && *text) {
        if (*text == quote && quote == '\'' && text[1] == quote) {
            *out++ = quote;
            text += 2;
        } else if (*text == quote) {
            text++;
            break;
        } else if (*text == '\\' && quote == '"') {
            text++;
            if (*text)
                out = put_escape(out, &text);
        } else if (*text == '\n') {
            while (out > start && (out[-1] == ' ' || out[-1] == '\t'))
                out--;
            text += strspn(text, " \t\r\n");
            *out++ = ' ';
        } else {
            *out++ = *text++;
        }
    }
    *from = text;
    struct node *node = new_scalar(start ? start : "", start ? (size_t)(out - start) : 0);
    free(start);
    return node;
}

/* --- flow nodes: [a, "b"] and {a: b} ---------------------------------------------------------- */

static void skip_blank(const char **from)
{
    for (;;) {
        *from += strspn(*from, " \t\r\n");
        if (**from != '#')
            return;
        *from = end_of(*from);
    }
}

static struct node *take_flow(const char **from, int depth)
{
    skip_blank(from);
    if (**from == '"' || **from == '\'')
        return take_quoted(from);
    if ((**from != '[' && **from != '{') || depth > 16) {
        const char *text = *from;
        while (**from && !strchr(",]}\n", **from) && !(**from == ':' && (*from)[1] == ' '))
            ++*from;
        const char *end = *from;
        while (end > text && isspace((unsigned char)end[-1]))
            end--;
        if (*from == text && **from)
            ++*from; /* always get on */
        return new_scalar(text, (size_t)(end - text));
    }
    bool mapping = **from == '{';
    struct node *parent = new_node(mapping ? MAPPING : SEQUENCE);
    ++*from;
    for (;;) {
        skip_blank(from);
        if (**from == 0)
            return parent;
        if (**from == ']' || **from == '}') {
            ++*from;
            return parent;
        }
        struct node *member = take_flow(from, depth + 1);
        skip_blank(from);
        if (mapping && **from == ':') {
            ++*from;
            char *key = member->text ? member->text : strdup("");
            member = take_flow(from, depth + 1);
            member->key = key;
            skip_blank(from);
        }
        append(parent, member);
        if (**from == ',')
            ++*from;
    }
}

/* --- block nodes ------------------------------------------------------------------------------ */

static struct node *take_block(size_t indent, int depth);

/* A literal | or folded > block whose lines are indented deeper than `parent`; `text` is at the mark. */
static struct node *take_literal(const char *text, size_t parent, bool top)
{
    bool folded = *text == '>';
    char chomp = 0;
    size_t indent = 0;
    for (text++; *text && !strchr(" \t\r\n", *text); text++) {
        if (*text == '-' || *text == '+')
            chomp = *text;
        else if (*text >= '1' && *text <= '9')
            indent = (top ? 0 : parent) + (size_t)(*text - '0');
    }
    at = after(text);
    char *out = malloc(strlen(at) + 2);
    size_t used = 0;
    if (!out)
        abort();
    while (*at) {
        const char *end = end_of(at);
        size_t deep = indent_of(at);
        bool blank = at + deep == end || at[deep] == '\r';
        if (!blank && !indent && (top || deep > parent))
            indent = deep; /* the first line that says something sets it */
        if (!blank && (deep < indent || indent == 0))
            break;
        size_t skip = deep < indent ? deep : indent;
        size_t length = (size_t)(end - at) - (blank ? (size_t)(end - at) : skip);
        if (length && at[skip + length - 1] == '\r')
            length--;
        if (folded && length && used && out[used - 1] == '\n' && (used < 2 || out[used - 2] != '\n'))
            out[used - 1] = ' ';
        memcpy(out + used, at + skip, length);
        used += length;
        out[used++] = '\n';
        at = after(at);
    }
    if (chomp != '+')
        while (used > 1 && out[used - 1] == '\n' && out[used - 2] == '\n')
            used--;
    if ((chomp == '-' || (used == 1 && chomp != '+')) && used && out[used - 1] == '\n')
        used--;
    struct node *node = new_scalar(out, used);
    free(out);
    return node;
}

/* A value that begins at `text` on the current line; `parent` is the indent its further lines exceed. */
static struct node *take_value(const char *text, size_t parent, int depth)
{
    text += strspn(text, " \t");
    if (*text == '|' || *text == '>')
        return take_literal(text, parent, false);
    if (*text == '"' || *text == '\'' || *text == '[' || *text == '{') {
        const char *from = text;
        struct node *node = take_flow(&from, depth);
        at = after(from);
        return node;
    }
    const char *end = plain_end(text);
    size_t room = strlen(text) + 1, used = (size_t)(end - text);
    char *joined = malloc(room);
    if (!joined)
        abort();
    memcpy(joined, text, used);
    at = after(text);
    while (*at && !is_empty(at) && indent_of(at) > parent) { /* a plain scalar goes on over deeper lines */
        text = at + indent_of(at);
        end = plain_end(text);
        joined[used++] = ' ';
        memcpy(joined + used, text, (size_t)(end - text));
        used += (size_t)(end - text);
        at = after(at);
    }
    struct node *node = new_scalar(joined, used);
    free(joined);
    return node;
}

/* Behind `key:` or `-`: something on the line, or a deeper node on the next lines, or nothing. */
static struct node *take_rest(const char *text, size_t indent, bool of_mapping, int depth)
{
    text += strspn(text, " \t");
    if (!is_empty(text))
        return take_value(text, indent, depth);
    at = after(text);
    skip_empty_lines();
    size_t deep = indent_of(at);
    /* A mapping's sequence need not be indented: "runcmd:\n- true". */
    if (*at && (deep > indent || (of_mapping && deep == indent && is_dash(at + deep))))
        return take_block(deep, depth + 1);
    return new_scalar("", 0);
}

/* The colon that ends a mapping key on this line, or NULL. */
static const char *find_colon(const char *text)
{
    const char *end = end_of(text);
    if (*text == '"' || *text == '\'') {
        const char *close = memchr(text + 1, *text, (size_t)(end - text - 1));
        return close && close[1] == ':' ? close + 1 : NULL;
    }
    for (const char *mark = text; mark < end; mark++)
        if (*mark == ':' && (mark + 1 == end || isspace((unsigned char)mark[1])))
            return mark;
    return NULL;
}

static struct node *take_sequence(size_t indent, int depth)
{
    struct node *sequence = new_node(SEQUENCE);
    for (skip_empty_lines(); *at && indent_of(at) == indent && is_dash(at + indent); skip_empty_lines()) {
        const char *text = at + indent + 1;
        size_t blanks = strspn(text, " \t");
        if (is_dash(text + blanks) && blanks) { /* "- - a": a sequence that begins on this line */
            size_t inner = indent + 1 + blanks;
            struct node *nested = new_node(SEQUENCE);
            append(nested, take_rest(at + inner + 1, inner, false, depth + 1));
            skip_empty_lines();
            if (*at && indent_of(at) == inner && is_dash(at + inner))
                nested->child->next = take_sequence(inner, depth + 1)->child;
            append(sequence, nested);
        } else {
            append(sequence, take_rest(text, indent, false, depth));
        }
    }
    return sequence;
}

static struct node *take_mapping(size_t indent, int depth)
{
    struct node *mapping = new_node(MAPPING);
    for (skip_empty_lines(); *at && indent_of(at) >= indent; skip_empty_lines()) {
        const char *text = at + indent;
        const char *colon = indent_of(at) == indent ? find_colon(text) : NULL;
        if (!colon) {
            say("seed: line not understood: %.*s", (int)(end_of(at) - at), at);
            at = after(at);
            continue;
        }
        bool quoted = *text == '"' || *text == '\'';
        char *key = strndup(text + quoted, (size_t)(colon - text) - 2 * quoted);
        struct node *value = take_rest(colon + 1, indent, true, depth);
        value->key = key;
        append(mapping, value);
    }
    return mapping;
}

static struct node *take_block(size_t indent, int depth)
{
    const char *text = at + indent;
    if (depth > 16) {
        at += strlen(at);
        return new_scalar("", 0);
    }
    if (is_dash(text))
        return take_sequence(indent, depth);
    if (find_colon(text))
        return take_mapping(indent, depth);
    return take_value(text, indent ? indent - 1 : 0, depth);
}

/* The document's mapping; an empty one when there is nothing to read. */
struct node *yaml_parse(const char *text)
{
    at = text;
    skip_empty_lines();
    if (*at == '{') {
        const char *from = at;
        return take_flow(&from, 0);
    }
    return take_mapping(0, 0);
}

const struct node *yaml_get(const struct node *mapping, const char *key)
{
    const struct node *found = NULL;
    for (const struct node *member = mapping ? mapping->child : NULL; member; member = member->next)
        if (member->key && strcmp(member->key, key) == 0)
            found = member; /* of two equal keys the last counts, as for PyYAML */
    return found;
}

const char *yaml_text(const struct node *mapping, const char *key)
{
    const struct node *found = yaml_get(mapping, key);
    return found && found->kind == SCALAR ? found->text : NULL;
}
