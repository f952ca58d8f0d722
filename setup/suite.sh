# Sourced by the other scripts: fetches packages of another suite, without changes to the machine's apt.

# archive_of COMPONENT: prints the archive of this machine's main suite, not of its updates or security suite.
archive_of() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v component="$1" '$3 == component && $2 !~ /[-\/]/ { print $1; exit }'
}

# use_suite DIRECTORY ARCHIVE SUITE COMPONENT KEYRING [ARCHITECTURE]: fetches the suite's index, and sets $suite_options to
# apt's options for only that suite and processor, with its state in the directory.  The options are words without blanks,
# meant to be split.
use_suite() {
    mkdir -p "$1"/{lists/partial,cache/archives/partial}
    echo "deb [signed-by=$5] $2 $3 $4" >"$1/sources.list"
    # The user _apt may not read root's private directory.  The signatures are still checked.
    suite_options="-o APT::Sandbox::User=root
        -o Dir::Etc::SourceList=$1/sources.list -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State::Lists=$1/lists -o Dir::State::Status=/dev/null
        ${6:+-o APT::Architecture=$6 -o APT::Architectures=$6}
        -o Dir::Cache=$1/cache -o Acquire::Languages=none -o APT::Update::Error-Mode=any"
    # shellcheck disable=SC2086
    apt-get $suite_options -q update
}
