fn main() -> std::process::ExitCode {
    lmrun::cli::main()
}
