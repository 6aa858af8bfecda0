# shellcheck shell=bash
# What the launchers share. They source it; it starts nothing.

action='' name='' dry_run=''
declare -A options=()
environment=() arguments=()

fail() {
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    fail "bash is $BASH_VERSION; it must be 4.4 or newer"
fi

# One line that a shell reads as the same words again.
quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
    if [[ $dry_run ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# Reads ACTION NAME [--OPTION VALUE ...] [-- ARGUMENT ...] of a command line.
#   $1: the options that there are, with a space before and behind each; then the command line.
parse() {
    local known=$1 words=() option
    shift
    while (($#)); do
        case $1 in
        --help) usage && exit ;;
        --dry-run) dry_run=1 ;;
        --spot) options[spot]=1 ;;
        --)
            arguments=("${@:2}")
            break
            ;;
        --*=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --*)
            option=${1#--}
            [[ $known == *" $option "* ]] || fail "there is no option $1; --help lists those there are"
            [[ ${2:-} && $2 != --* ]] || fail "$1 is given without a value"
            if [[ $option == env ]]; then
                [[ $2 == [A-Za-z_]*=* ]] || fail "--env is '$2'; it must be NAME=VALUE"
                environment+=("$2")
            else
                options[$option]=$2
            fi
            shift
            ;;
        *) words+=("$1") ;;
        esac
        shift
    done
    ((${#words[@]} == 2)) || fail "an action and a name are needed, and '${words[*]}' was given; --help explains them"
    # shellcheck disable=SC2034  # both are of the script that sources this
    action=${words[0]} name=${words[1]}
}

# Refuses to go on without each of some options.
need() {
    local option
    for option in "$@"; do
        [[ ${options[$option]:-} ]] || fail "--$option is missing; $action needs it"
    done
}

need_arguments() {
    ((${#arguments[@]})) || fail "nothing to train is given; behind -- stands what follows dcjax train"
}

# How often a run that ends with 75 or 134 is started again.
restarts() {
    [[ ${options[restarts]:=100} =~ ^[0-9]+$ ]] || fail "--restarts is '${options[restarts]}'; it must be a whole number"
}
